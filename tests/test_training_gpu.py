"""Gradients of the engine on a CUDA device, in each precision: `pytest -m gpu tests/test_training_gpu.py`."""

import pytest
import torch

from data.loader import Batch
from models.transnormer import TransNormer
from training.config import compose
from training.engine import Engine
from training.train_config import TrainConfig

pytestmark = pytest.mark.gpu

SETTINGS = ("model=tnl-tiny", "model.vocab_size=8192", "seq_len=1024", "batch_tokens=8192")


def text_like_batch() -> Batch:
    """Zipf's law: the commonest token comes in hundreds of places, whose gradients are summed."""
    share = 1 / torch.arange(1, 8193)
    tokens = torch.multinomial(share, 8193, replacement=True, generator=torch.Generator().manual_seed(0))[
        None
    ]
    bounds = torch.arange(0, 8193, 1024, dtype=torch.int32)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), bounds)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("compile_blocks", ["true", "false"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_gradients_are_those_of_plain_autograd_on_a_cpu(
    world, precision, tolerance, compile_blocks, zero_stage
):
    choices = (
        f"engine=zero{zero_stage}",
        f"engine.precision={precision}",
        f"engine.compile={compile_blocks}",
    )
    from deepspeed.utils import safe_get_full_grad  # slow to import, so not where tests are collected

    config = compose(TrainConfig, [*SETTINGS, *choices], "train")
    batch = text_like_batch()
    exact = TransNormer(config.model)
    loss = exact(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens) / batch.tokens.numel()
    loss.backward()
    engine = Engine(TransNormer(config.model), config, world, accumulation_steps=1, micro_batch_size=8)
    try:
        engine.model.train()
        assert float(engine._backward(batch, 1 / batch.tokens.numel(), is_last=True)) > 0
        found = {name: safe_get_full_grad(p) for name, p in engine.model.named_parameters()}
    finally:
        engine.close()
    for name, p in exact.named_parameters():
        if p.ndim == 2:
            error = float((found[name].float().cpu() - p.grad).norm() / p.grad.norm())
            assert error <= tolerance, f"{name}: {error:.1e}"
