"""Muon: its step against a plain one in fp64, its matrices under every split, and real runs with it."""

from pathlib import Path

import pytest
import torch
from training_helpers import lines, run, settings

from models.config import ModelConfig
from models.transnormer import TransNormer
from training.checkpoint import open_checkpoint
from training.config import compose
from training.errors import SettingError
from training.muon import MatrixPart, matrix_parts, orthogonalize
from training.optimizer import OptimConfig, build_optimizer
from training.train_config import TrainConfig

STEPS = 4
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Five Newton–Schulz iterations of one matrix, on its singular values in fp64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = A * s + B * s**3 + C * s**5
    return u @ torch.diag(s) @ vh


def small_model() -> TransNormer:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "glu_size": 48}
    return TransNormer(ModelConfig(vocab_size=40, norm="rmsnorm", **sizes))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40)])
def test_orthogonalize_maps_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    expected = torch.stack([orthogonalized(matrix) for matrix in x]) * 0.2 * shape[1] ** 0.5
    assert torch.allclose(orthogonalize(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert orthogonalize(x).square().mean().sqrt() == pytest.approx(0.2, rel=0.3)


def test_steps_are_those_of_a_plain_implementation():
    """Two steps: Muon for the blocks' matrices, each stacked map alone; AdamW for the rest."""
    torch.manual_seed(0)
    model = small_model()
    config = OptimConfig(name="muon", lr=0.01, weight_decay=0.1, momentum=0.9, beta1=0.8, beta2=0.9)
    optimizer = build_optimizer(model, config)
    for name, p in model.named_parameters():
        if ".layers." in name and p.ndim == 2:
            optimizer.parts[p] = matrix_parts(name, tuple(p.shape), 0, 0, p.numel())
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in (1, 2):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            gradient, value = p.grad.double(), expected[name]
            if name.endswith(("proj.weight", "l1.weight", "l2.weight", "l3.weight")):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                ahead = 0.9 * first[name] + 0.1 * gradient
                maps = ahead.chunk(4) if "qkvu" in name else [ahead]
                update = torch.cat([0.2 * max(m.shape) ** 0.5 * orthogonalized(m) for m in maps])
                expected[name] = value * (1 - 0.01 * 0.1) - 0.01 * update
                continue
            decay = 0.1 if p.ndim == 2 else 0.0
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            root = (second[name] / (1 - 0.9**step)).sqrt() + 1e-8
            expected[name] = value * (1 - 0.01 * decay) - 0.01 * first[name] / (1 - 0.8**step) / root
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), expected[name], rtol=1e-4, atol=2e-6), name


def test_stacked_maps_are_cut_wherever_a_rank_begins():
    """A weight of 4 maps of (2, 2), of which elements 3 to 9 lie at 5: parts of the first three maps."""
    parts = matrix_parts("model.layers.0.token_mixer.qkvu_proj.weight", (8, 2), 5, 3, 7)
    assert parts == [
        MatrixPart((2, 2), 5, 3, 1),
        MatrixPart((2, 2), 6, 0, 4),
        MatrixPart((2, 2), 10, 0, 2),
        MatrixPart((2, 2), 0, 0, 0),
    ]
    assert [part.is_whole for part in parts] == [False, True, False, False]


def test_offloading_is_refused():
    with pytest.raises(SettingError, match="optim=muon"):
        compose(TrainConfig, ["optim=muon", "engine=zero2_offload"], "train")


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """A run of two ranks at ZeRO 1, in fp32, where rounding explains no difference."""
    return train(text, tmp_path_factory.mktemp("reference") / "run", "engine=zero1", ranks=2)


def train(text: Path, run_dir: Path, *more: str, ranks: int, steps: int = STEPS) -> Path:
    always = ["optim=muon", "engine.precision=fp32", f"schedule.total_steps={STEPS}", f"max_steps={steps}"]
    result = run(["train.py", *settings(text, run_dir, *always, *more)], ranks)
    assert result.returncode == 0, result.stderr
    return run_dir


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(run_dir / "checkpoints" / f"step_{STEPS:08d}")
    return {
        f"{kind}/{name}": checkpoint.read(name, kind, 0, torch.Size(checkpoint.shapes[name]).numel())
        for kind, name in checkpoint.fragments
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks"), [(0, 2), (1, 1), pytest.param(2, 3, marks=pytest.mark.torture), (3, 2)]
)
def test_stages_and_ranks_give_the_same_weights(stage, ranks, text, reference, tmp_path):
    batch = ["batch_tokens=192", "micro_batch_size=1"] if ranks == 3 else []
    if batch:
        reference = train(text, tmp_path / "reference", *batch, "engine=zero1", ranks=1)
    other = state(train(text, tmp_path / "run", f"engine=zero{stage}", *batch, ranks=ranks))
    expected = state(reference)
    assert other.keys() == expected.keys()
    assert "momentum/model.layers.0.channel_mixer.l1.weight" in other
    assert "exp_avg/model.embed_tokens.weight" in other
    for name, tensor in expected.items():
        assert torch.allclose(other[name], tensor, rtol=1e-3, atol=2e-5), name
    losses = [line["loss"] for _, line in sorted(lines(reference).items())]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision"), [pytest.param(1, "bf16", marks=pytest.mark.torture), (3, "fp32")]
)
def test_a_resumed_run_is_the_run_that_never_stopped(stage, precision, text, tmp_path):
    more = [f"engine=zero{stage}", f"engine.precision={precision}"]
    whole = train(text, tmp_path / "whole", *more, ranks=2)
    parts = train(text, tmp_path / "parts", *more, ranks=2, steps=2)
    train(text, parts, *more, ranks=2)
    left, right = state(whole), state(parts)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.slow
def test_a_run_goes_on_at_another_number_of_ranks_and_stage(text, reference, tmp_path):
    run_dir = train(text, tmp_path / "run", "engine=zero3", ranks=2, steps=2)
    moved = state(train(text, run_dir, "engine=zero1", ranks=1))
    for name, tensor in state(reference).items():
        assert torch.allclose(moved[name], tensor, rtol=1e-3, atol=2e-5), name
