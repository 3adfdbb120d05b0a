"""AdamW with 8-bit moments: near AdamW, exact through a save, and resumed bit for bit at every stage."""

import pytest
import torch
from torch import nn
from training_helpers import lines, run, settings

from training.adamw_8bit import AdamW8bit, dequantize, dequantize_sq, quantize, quantize_sq


def moments(num_blocks: int) -> torch.Tensor:
    """Magnitudes over ten decades, and a block of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_blocks, 256, generator=generator) * 10 ** torch.linspace(-10, 0, num_blocks)[:, None]
    x[0] = 0
    return x


def test_requantizing_changes_nothing():
    x = moments(50)
    codes, scale = quantize(x)
    again, scale_again = quantize(dequantize(codes, scale))
    assert torch.equal(codes, again)
    assert torch.equal(scale, scale_again)
    codes, scale = quantize_sq(x.square())
    again, scale_again = quantize_sq(dequantize_sq(codes, scale))
    assert torch.equal(codes, again)
    assert torch.equal(scale, scale_again)


def test_codes_are_near_and_keep_zero_and_sign():
    x = moments(50)
    back = dequantize(*quantize(x))
    large = x.abs() > 0.1 * x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(back[large], x[large], rtol=0.03, atol=0)
    assert (back * x >= 0).all()
    squared = x.square()
    back = dequantize_sq(*quantize_sq(squared))
    large = squared > 1e-3 * squared.amax(-1, keepdim=True)
    torch.testing.assert_close(back[large].sqrt(), squared[large].sqrt(), rtol=0.03, atol=0)
    assert torch.equal(back > 0, squared > 0)  # nothing is divided by epsilon alone


def weights(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("shape", [(64, 64), (7, 100), (3,)])  # whole blocks, a part of one, less than one
def test_steps_are_near_those_of_adamw(shape):
    exact, coded = weights(shape), weights(shape)
    group = {"weight_decay": 0.1, "muon": False}
    reference = torch.optim.AdamW([{"params": [exact], **group}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    optimizer = AdamW8bit([{"params": [coded], **group}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    start, generator = exact.detach().clone(), torch.Generator().manual_seed(2)
    for _ in range(20):
        exact.grad = 0.5 + torch.randn(shape, generator=generator)
        coded.grad = exact.grad.clone()
        reference.step()
        optimizer.step()
    moved = (exact - start).norm()
    assert (coded - exact).norm() < 0.03 * moved


def test_moments_unpacked_for_a_save_leave_the_next_step_as_it_was():
    one, other = weights((10, 77)), weights((10, 77))
    optimizers = [AdamW8bit([{"params": [p], "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
                  for p in (one, other)]  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for step in range(4):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = one.grad.clone()
        if step == 2:
            optimizers[1].unpack(other)
            assert optimizers[1].state[other]["exp_avg"].shape == other.shape
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(one, other)
    assert optimizers[1].state[other]["codes"].dtype == torch.int8


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.torture), 1, pytest.param(3, marks=pytest.mark.torture)]
)
def test_a_resumed_run_is_the_run_that_never_stopped(stage, text, tmp_path):
    more = [f"engine=zero{stage}", "schedule.total_steps=5", "optim=adamw_8bit"]
    for name, steps in (("whole", (5,)), ("parts", (2, 5))):
        for max_steps in steps:
            arguments = settings(text, tmp_path / name, *more, f"max_steps={max_steps}")
            result = run(["train.py", *arguments], num_ranks=2)
            assert result.returncode == 0, result.stderr
    assert "resuming at step 2" in result.stderr
    curves = [
        [line["loss"] for _, line in sorted(lines(tmp_path / name).items())] for name in ("whole", "parts")
    ]
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0]


def test_weights_that_are_not_contiguous_are_refused():
    p = torch.nn.Parameter(torch.zeros(32, 16).T)
    p.grad = torch.ones_like(p)
    group = {"params": [p], "weight_decay": 0.1, "muon": False}
    with pytest.raises(RuntimeError, match="view"):
        AdamW8bit([group], lr=1e-3, betas=(0.9, 0.95), eps=1e-8).step()
