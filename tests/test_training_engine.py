"""What the engine does beside DeepSpeed: compiled blocks, clipped gradients."""

import pytest
import torch

from data.loader import Batch
from models.transnormer import TransNormer
from training.config import compose
from training.engine import Engine, compile_for_any_documents
from training.memory import state_parts
from training.train_config import TrainConfig


def test_blocks_compile_once_for_any_number_of_documents():
    """ZeRO 3 hands a block copies of its arguments, so that marks made before them are lost."""

    def block(x, cu_seqlens):
        return x * cu_seqlens.sum()

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = compile_for_any_documents(block)
    x = torch.ones(4)
    for bounds in ([0, 4], [0, 1, 4], [0, 1, 2, 3, 4]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        assert torch.equal(compiled(x, cu_seqlens), x * sum(bounds))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 0.3, 100.0])
def test_gradients_are_clipped_at_the_norm_that_is_set_or_not_at_all(clip, stage, precision, world):
    settings = [f"engine=zero{stage}", f"engine.precision={precision}", f"optim.grad_clip={clip}"]
    sizes = ["model.vocab_size=64", "model.num_layers=1", "model.hidden_size=32", "model.glu_size=48"]
    config = compose(TrainConfig, [*settings, *sizes], "train")
    engine = Engine(TransNormer(config.model), config, world, accumulation_steps=1, micro_batch_size=2)
    tokens = torch.arange(66).reshape(2, 33) % 64
    norm = engine.train_step([Batch(tokens[:, :-1], tokens[:, 1:], None)], 64, 0.001).grad_norm
    moments = torch.cat([fragment.tensors["exp_avg"] for fragment in engine.fragments()])
    engine.close()
    assert norm > 0.4
    clipped = min(norm, clip) if clip else norm
    assert float(moments.double().norm()) == pytest.approx((1 - config.optim.beta1) * clipped, rel=1e-6)


@pytest.mark.parametrize("form", ["norm=srmsnorm", "norm=rmsnorm", "norm=layernorm", "tie_embeddings=false"])
def test_stages_take_the_same_steps_bit_for_bit(form, world):
    """Two micro-steps of each of three, with repeated tokens: what one stage adds in fp32, all do."""
    sizes = ["model.vocab_size=16", "model.num_layers=2", "model.hidden_size=32", "model.glu_size=48"]
    masters = []
    for stage in range(4):
        settings = [f"engine=zero{stage}", "engine.precision=bf16", *sizes, f"model.{form}"]
        config = compose(TrainConfig, settings, "train")
        engine = Engine(TransNormer(config.model), config, world, accumulation_steps=2, micro_batch_size=2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            parts = torch.randint(16, (2, 2, 65), generator=generator)
            engine.train_step([Batch(x[:, :-1], x[:, 1:], None) for x in parts], 256, 0.01)
        masters.append({fragment.name: fragment.tensors["param"].clone() for fragment in engine.fragments()})
        engine.close()
    for other in masters[1:]:
        assert [name for name, value in masters[0].items() if not torch.equal(value, other[name])] == []


def test_the_plan_counts_the_gradients_that_deepspeed_holds(world):
    """Bytes of gradients and of fp32 sums where a first and a second backward pass of a step begin."""
    sizes = ["model.vocab_size=64", "model.num_layers=1", "model.hidden_size=32", "model.glu_size=48"]
    config = compose(TrainConfig, [*sizes, "engine=zero1", "engine.precision=bf16"], "train")
    engine = Engine(TransNormer(config.model), config, world, accumulation_steps=2, micro_batch_size=2)
    found = []

    def look(*_) -> None:
        gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
        sums = engine.deepspeed.optimizer.fp32_groups_gradients_flat
        found.append([sum(x.numel() * x.element_size() for x in tensors) for tensors in (gradients, sums)])

    engine.model.model.final_norm.register_forward_hook(look)
    batch = Batch(torch.arange(16).reshape(2, 8), torch.arange(16).reshape(2, 8), None)
    for _ in range(2):
        engine.train_step([batch, batch], 32, 0.001)
    engine.close()
    for index, held in enumerate(found):
        parts = state_parts(config, 1, with_sums=index % 2 == 1)
        assert held == pytest.approx([parts["gradients"], parts["fp32 gradient sums"]], rel=0.01)


def test_a_step_without_targets_changes_nothing(world):
    sizes = ["model.vocab_size=64", "model.num_layers=1", "model.hidden_size=32", "model.glu_size=48"]
    config = compose(TrainConfig, [*sizes, "optim.weight_decay=0", "engine.precision=fp32"], "train")
    engine = Engine(TransNormer(config.model), config, world, accumulation_steps=1, micro_batch_size=1)
    before = [fragment.tensors["param"].clone() for fragment in engine.fragments()]
    micro_steps = []
    batch = Batch(torch.tensor([[3]]), torch.tensor([[-100]]), None)
    result = engine.train_step([batch], 0, 0.001, progress=lambda: micro_steps.append(1))
    after = [fragment.tensors["param"].clone() for fragment in engine.fragments()]
    engine.close()
    assert (result.loss, result.grad_norm, len(micro_steps)) == (0.0, 0.0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
