"""fp8 products: near the exact ones, in training and in the blocks only, refused where they can't be."""

import pytest
import torch

from models.config import ModelConfig
from models.fp8 import Fp8Linear, Fp8Product, to_fp8, use_fp8
from models.layers import Linear
from models.transnormer import TransNormer

CPU = torch.device("cpu")


def relative(value, expected):
    return float((value.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("tokens", [64, 50])  # 50: no multiple of 16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_near_the_exact_ones(tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (1e-3 * torch.randn(tokens, 128, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(256, 128, generator=generator).to(dtype).requires_grad_()
    grad = (1e-6 * torch.randn(tokens, 256, generator=generator)).to(dtype)  # far below what fp8 itself holds
    y = Fp8Product.apply(x, weight)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == weight.grad.dtype == dtype
    assert relative(y, x @ weight.T) < 0.06
    assert relative(x.grad, grad @ weight) < 0.1
    assert relative(weight.grad, grad.T @ x) < 0.1


def test_the_largest_value_is_kept_and_the_rest_rounded():
    x = torch.tensor([[3.0, -7.0, 0.0, 1e-9]])
    rounded, scale = to_fp8(x, torch.float8_e4m3fn)
    assert (rounded.float() * scale).tolist()[0][1:] == [-7.0, 0.0, 0.0]
    assert float(rounded[0, 0].float() * scale) == pytest.approx(3.0, rel=2**-4)
    assert torch.isfinite(to_fp8(torch.zeros(2, 2), torch.float8_e5m2)[0].float()).all()
    assert to_fp8(torch.tensor([[float("inf"), 1.0]]), torch.float8_e5m2)[0].float().isnan().any()


def make_model(**changes) -> TransNormer:
    return TransNormer(
        ModelConfig(vocab_size=64, hidden_size=128, num_layers=2, num_heads=2, glu_size=192, **changes)
    )


def test_only_the_blocks_maps_and_only_in_training():
    model, exact = make_model(gate="low_rank"), make_model(gate="low_rank")
    use_fp8(model, CPU)
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, Linear)}
    assert type(model.lm_head) not in (Linear, Fp8Linear)
    in_fp8 = {name.rsplit(".", 1)[-1] for name, kind in kinds.items() if kind is Fp8Linear}
    assert in_fp8 == {"qkv_proj", "out_proj", "l1", "l2", "l3"}
    tokens = torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(tokens), exact.eval()(tokens))
    losses = [m.train()(tokens, tokens) for m in (model, exact)]
    assert 0 < abs(losses[0] - losses[1]) < 0.02 * losses[1]
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert relative(p.grad, q.grad) < 0.25, name


def test_recomputed_products_are_the_same():
    tokens, losses = torch.randint(0, 64, (1, 32)), []
    for mode in ("none", "selective", "full"):
        model = make_model(activation_checkpointing=mode)
        use_fp8(model, CPU)
        model.train()(tokens, tokens).backward()
        losses.append(model.model.layers[0].channel_mixer.l1.weight.grad)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_an_older_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"engine\.fp8=true .* NVIDIA A100 has 8\.0.*engine\.fp8=false"):
        use_fp8(make_model(), torch.device("cuda"))


def test_odd_widths_are_refused():
    model = TransNormer(ModelConfig(vocab_size=64, hidden_size=128, num_layers=1, num_heads=2, glu_size=200))
    with pytest.raises(ValueError, match=r"model\.glu_size .*multiples of 16.*\(200, 128\)"):
        use_fp8(model, CPU)
