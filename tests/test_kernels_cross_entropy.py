"""The in-place cross entropy against PyTorch's, in float64, for both implementations."""

import pytest
import torch
import torch.nn.functional as F

from kernels.cross_entropy import cross_entropy


def implementations():
    from kernels import triton_cross_entropy

    return {"torch": cross_entropy, "triton": triton_cross_entropy.cross_entropy}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("vocab_size", [3, 1000, 8192, 20001])
def test_losses_and_gradients(name, vocab_size):
    torch.manual_seed(0)
    logits = 4 * torch.randn(7, vocab_size, device=DEVICE)
    targets = torch.randint(0, vocab_size, (7,), device=DEVICE)
    targets[2] = -100
    targets[3] = vocab_size - 1
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none", ignore_index=-100)
    expected.sum().backward()

    untouched = logits.clone()
    losses = implementations()[name](logits, targets, with_gradient=False)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, untouched)
    again = implementations()[name](logits, targets, with_gradient=True)
    assert torch.equal(again, losses)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_logits_of_minus_infinity(name):
    """As many as a block of the kernel at the start, and more."""
    logits = torch.full((1, 9000), float("-inf"), device=DEVICE)
    logits[0, 8500:8502] = torch.tensor([1.0, 2.0])
    losses = implementations()[name](logits, torch.tensor([8500], device=DEVICE), with_gradient=True)
    assert float(losses) == pytest.approx(1.3132617)
    assert logits[0, 8499:8502].tolist() == pytest.approx([0.0, -0.7310586, 0.7310586])


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's NumPy
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_rows_that_are_not_scored_count_nothing_whatever_they_hold(name, value):
    logits = torch.zeros(2, 4, device=DEVICE)
    logits[0, 0] = value
    losses = implementations()[name](logits, torch.tensor([-100, 1], device=DEVICE), with_gradient=True)
    assert losses.tolist() == pytest.approx([0.0, 1.3862944])
    assert logits.flatten().tolist() == pytest.approx([0, 0, 0, 0, 0.25, -0.75, 0.25, 0.25])


@pytest.mark.gpu
def test_bf16_logits_of_a_real_size():
    torch.manual_seed(0)
    logits = torch.randn(4096, 64000, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 64000, (4096,), device="cuda")
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    losses = cross_entropy(logits, targets, with_gradient=True)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-2, atol=1e-6)


def test_targets_outside_the_vocabulary_are_not_taken_for_others():
    targets = torch.tensor([4, -1, 1], device=DEVICE)
    losses = implementations()["triton"](torch.zeros(3, 4, device=DEVICE), targets, with_gradient=False)
    assert losses.isnan().tolist() == [True, True, False]
    for target in (4, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            implementations()["torch"](torch.zeros(1, 4), torch.tensor([target]), with_gradient=False)
