"""Training in chunks of a sequence gives the loss and gradients of the whole, whatever is packed and how."""

import pytest
import torch
from model_helpers import make_model
from training_helpers import lines, run, settings

from data.loader import Batch
from models.config import ModelConfig
from models.transnormer import TransNormer
from training.config import compose
from training.errors import SettingError
from training.sequence_chunks import backward_in_chunks, cut
from training.train_config import TrainConfig

CPU = torch.device("cpu")


class PlainEngine:
    """What DeepSpeed's engine does on one rank; counts the backward passes up to the one that is last."""

    def __init__(self, model: TransNormer) -> None:
        self.model, self.boundaries = model, []

    def __call__(self, *arguments, **settings):
        return self.model(*arguments, **settings)

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        self.boundaries.append(is_last)

    def backward(self, loss, scale_wrt_gas):
        assert not scale_wrt_gas
        loss.backward()


def tiny_model(**changes) -> TransNormer:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "glu_size": 48}
    return make_model(ModelConfig(**sizes | changes)).train()


def make_batch(num_rows: int, length: int, bounds: list[int] | None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (num_rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:, 5] = -100
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    return Batch(tokens[:, :-1], targets, cu_seqlens)


@pytest.mark.parametrize(
    ("num_rows", "bounds", "chunk_tokens"),
    [
        (1, None, 32),
        (3, None, 96),
        (1, None, 40),  # does not divide the 96 tokens
        (1, None, 95),  # the first chunk has one token
        (1, [0, 96], 32),
        (1, [0, 10, 40, 41, 96], 32),  # across cuts, within and at the ends of chunks
        (1, [0, 32, 64, 96], 32),  # cuts between sequences only
        (1, [0, 3, 3, 64, 70, 96], 16),  # an empty one, and one over three cuts
    ],
)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_are_those_of_the_whole(num_rows, bounds, chunk_tokens, recompute):
    batch = make_batch(num_rows, 96, bounds)
    whole, cut_up = tiny_model(lrpe="all"), tiny_model(lrpe="all", activation_checkpointing=recompute)
    loss = whole(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
    (loss / 7).backward()
    engine = PlainEngine(cut_up)
    chunks = cut(batch, chunk_tokens)
    found = backward_in_chunks(engine, cut_up.config, chunks, 1 / 7, CPU, is_last=True)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    assert engine.boundaries == [False] * (len(chunks) - 1) + [True]
    for (name, p), q in zip(whole.named_parameters(), cut_up.parameters(), strict=True):
        error = (q.grad - p.grad).norm() / p.grad.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_gradients_come_through_the_state():
    """Without them an early token's share in later chunks' losses would be missing."""
    batch = make_batch(1, 64, None)
    batch.targets[:, :-8] = -100  # only the last chunk is scored
    model = tiny_model()
    backward_in_chunks(PlainEngine(model), model.config, cut(batch, 16), 1.0, CPU, is_last=True)
    reference = tiny_model()
    reference(batch.tokens, batch.targets).backward()
    early = batch.tokens[0, :16].unique()
    expected = reference.model.embed_tokens.weight.grad[early]
    torch.testing.assert_close(model.model.embed_tokens.weight.grad[early], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_in_chunks_has_the_curve_of_the_run_without(text, tmp_path):
    for name, chunk in (("whole", 0), ("chunks", 48)):
        more = ["engine=zero2", "max_steps=4", "seq_len=512", "batch_tokens=1024", "layer_stats_every=4"]
        more.append(f"engine.sequence_chunk={chunk}")
        result = run(["train.py", *settings(text, tmp_path / name, *more, "micro_batch_size=1")], num_ranks=2)
        assert result.returncode == 0, result.stderr
    whole, chunks = (lines(tmp_path / name) for name in ("whole", "chunks"))
    assert whole.keys() == chunks.keys()
    whole_loss, chunks_loss = (
        lines(tmp_path / name, "valid_loss")[4]["valid_loss"] for name in ("whole", "chunks")
    )
    assert chunks_loss == pytest.approx(whole_loss, abs=2e-3)  # validation goes in chunks, too
    assert lines(tmp_path / "chunks", "layer_activation_rms").keys() == {4}
    for step, line in whole.items():
        assert chunks[step]["loss"] == pytest.approx(line["loss"], abs=2e-3)
        assert chunks[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=0.02)


def test_only_the_first_chunk_is_short():
    chunks = cut(make_batch(1, 100, [0, 30, 100]), 32)
    assert [chunk.tokens.shape[1] for chunk in chunks] == [4, 32, 32, 32]
    assert [chunk.goes_on for chunk in chunks] == [True, True, True, False]
    assert [chunk.cu_seqlens is None for chunk in chunks] == [True, False, True, True]
    assert chunks[1].cu_seqlens.tolist() == [0, 26, 32]
    assert chunks[1].position.tolist() == [4, 0]
    assert chunks[2].position == 6


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("model=llama-tiny", "model.attention='softmax'"),
        ("model.softmax_every=2", "model.softmax_every=2"),
        ("model.attention=quadratic", "model.attention='quadratic'"),
        ("model.dropout=0.1", "model.dropout=0.1"),
    ],
)
def test_what_carries_no_state_is_refused(setting, key):
    with pytest.raises(SettingError, match=f"engine.sequence_chunk=64 .*{key}"):
        compose(TrainConfig, ["engine.sequence_chunk=64", setting], "train")
