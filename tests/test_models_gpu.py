"""The models on a CUDA device: `pytest -m gpu tests/test_models_gpu.py`, under a minute."""

import itertools

import pytest
import torch

from models.config import ModelConfig
from models.transnormer import TransNormer

pytestmark = pytest.mark.gpu

MODELS = {
    "tnl": {},
    "hybrid": {"softmax_every": 2},
    "llama": {"attention": "softmax", "norm": "rmsnorm", "channel_mixer": "swiglu", "lrpe": "none"},
}
BOUNDS = (0, 700, 701, 701, 1500, 2048)


def make_model(settings, dtype: torch.dtype, recompute: str) -> TransNormer:
    """The same weights at every dtype: head dim 128, products in `dtype`."""
    sizes = {"vocab_size": 512, "hidden_size": 256, "num_layers": 3, "num_heads": 2, "glu_size": 512}
    model = TransNormer(ModelConfig(**sizes, activation_checkpointing=recompute, **settings)).cuda()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_((3 * p).bfloat16())
    model.compute_dtype = dtype
    return model


def loss_and_gradients(model: TransNormer, tokens, bounds):
    """Of all sequences between `bounds`, summed."""
    loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=bounds)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["none", "selective", "compiled"])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_packed_documents_in_bf16_are_documents_apart_in_fp32(settings, recompute):
    """In bf16 softmax layers take varlen_attn; in fp32 each document goes through the dense kernels alone."""
    exact = make_model(settings, torch.float32, "none")
    tokens = torch.randint(512, (1, BOUNDS[-1] + 1), generator=torch.Generator().manual_seed(0)).cuda()
    expected = 0.0
    for start, stop in itertools.pairwise(BOUNDS):
        if stop > start:
            loss = exact(tokens[:, start:stop], tokens[:, start + 1 : stop + 1])
            loss.backward()
            expected += float(loss.detach())
    model = make_model(settings, torch.bfloat16, "selective" if recompute == "compiled" else recompute)
    if recompute == "compiled":
        for block in model.model.layers:
            block.compile(dynamic=False)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    loss, gradients = loss_and_gradients(model, tokens, bounds)
    assert abs(loss - expected) <= 1e-3 * expected
    for name, p in exact.named_parameters():
        error = float((gradients[name] - p.grad).norm() / p.grad.norm())
        few = p.numel() < 1000  # LRPE's frequencies: sums of many terms that nearly cancel
        assert error <= (0.2 if few else 3e-2), f"{name}: {error:.1e}"
