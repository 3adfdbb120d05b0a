"""The models on a CUDA device: `pytest -m gpu tests/test_models_gpu.py`, a few minutes."""

import itertools

import pytest
import torch

from models.config import ModelConfig
from models.layers import LinearCrossEntropy
from models.transnormer import TransNormer

pytestmark = pytest.mark.gpu

MODELS = {
    "tnl": {},
    "hybrid": {"softmax_every": 2},
    "llama": {"attention": "softmax", "norm": "rmsnorm", "channel_mixer": "swiglu", "lrpe": "none"},
}
BOUNDS = (0, 700, 701, 701, 1500, 2048)


def make_model(settings, dtype: torch.dtype, recompute: str, num_heads: int) -> TransNormer:
    """The same weights at every dtype, products in `dtype`."""
    sizes = {"vocab_size": 8192, "hidden_size": 256, "num_layers": 3, "num_heads": num_heads, "glu_size": 512}
    model = TransNormer(ModelConfig(**sizes, activation_checkpointing=recompute, **settings)).cuda()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_((3 * p).bfloat16())
    model.compute_dtype = dtype
    return model


def text_like_tokens() -> torch.Tensor:
    """Zipf's law: the commonest token comes in hundreds of places, whose gradients are summed."""
    share = 1 / torch.arange(1, 8193)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(share, BOUNDS[-1] + 1, replacement=True, generator=generator)[None].cuda()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_batches_in_bf16_have_the_loss_and_gradients_of_fp32(settings, compiled):
    """Sequences side by side, not packed: softmax layers take cuDNN's attention."""
    tokens, results = text_like_tokens(), []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(settings, dtype, "selective", num_heads=2)
        if compiled:
            for block in model.model.layers:
                block.compile(dynamic=False)
        loss = model(tokens[:, :-1].view(4, -1), tokens[:, 1:].reshape(4, -1))
        loss.backward()
        results.append((float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}))
    (expected, exact), (loss, gradients) = results
    assert abs(loss - expected) <= 1e-3 * expected
    for name, gradient in exact.items():
        if gradient.ndim == 2:
            error = float((gradients[name] - gradient).norm() / gradient.norm())
            assert error <= 3e-2, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recompute", ["none", "selective", "compiled"])
@pytest.mark.parametrize("num_heads", [2, 4])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_packed_documents_are_documents_apart(settings, num_heads, recompute, dtype):
    """Against each document alone in eager fp32. In bf16 softmax layers take varlen_attn."""
    exact = make_model(settings, torch.float32, "none", num_heads)
    tokens, expected = text_like_tokens(), 0.0
    for start, stop in itertools.pairwise(BOUNDS):
        if stop > start:
            loss = exact(tokens[:, start:stop], tokens[:, start + 1 : stop + 1])
            loss.backward()
            expected += float(loss.detach())
    model = make_model(settings, dtype, "selective" if recompute == "selective" else "none", num_heads)
    if recompute == "compiled":
        for block in model.model.layers:
            block.compile(dynamic=False)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=bounds)
    loss.backward()
    exactly = dtype == torch.float32
    assert abs(float(loss.detach()) - expected) <= (1e-5 if exactly else 1e-3) * expected
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, p in exact.named_parameters():
        if p.ndim == 2 or exactly:  # in bf16 LRPE's frequencies get noise: their terms nearly cancel
            error = float((gradients[name] - p.grad).norm() / p.grad.norm())
            assert error <= (1e-4 if exactly else 3e-2), f"{name}: {error:.1e}"


def test_gradients_of_a_loss_are_scaled_in_fp32():
    """A mean is a sum over a number that bf16 may not hold: 1 / 65281 would be 0.4 % off."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(1000, 128, device="cuda", generator=generator).bfloat16() for _ in range(2))
    targets = torch.randint(1000, (1000,), device="cuda", generator=generator)
    gradients = []
    for factor in (1.0, 1 / 65281):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        gradients.append(torch.autograd.grad(LinearCrossEntropy.apply(*inputs, targets) * factor, inputs))
    for whole, scaled in zip(*gradients, strict=True):
        assert torch.equal(scaled, (whole.float() * (1 / 65281)).bfloat16())
