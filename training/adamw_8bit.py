"""AdamW with moments of 8 bits: 2 bytes a parameter instead of 8 (Dettmers et al. 2021, arXiv 2110.02861).

Moments are held in blocks of 256 elements as codes and one fp32 scale, the block's largest magnitude. Codes
are spaced as a power, finer towards zero: scale (c / 127)² with a sign for the first moment and
scale (c / 255)⁴ for the second, whose square root is what divides. They are exact at the largest element, so
quantizing what was just dequantized gives the same codes and scale: a checkpoint holds fp32 moments, and a
resumed run is bit for bit the run that never stopped.
Shapes: E elements of a parameter or flat tensor, K = ceil(E / 256) blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
SLICE_BLOCKS = 2**18  # updated at once: bounds the fp32 temporaries
CODES = ("codes", "codes_sq", "scale", "scale_sq")


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay as `torch.optim.AdamW`; parameters and gradients in fp32.

    A parameter's state is `step` and either packed, int8 `codes` and uint8 `codes_sq` (K, 256) with fp32
    `scale` and `scale_sq` (K, 1), or for saving and loading unpacked, `exp_avg` and `exp_avg_sq`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.compiled: Callable[..., None] | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        self.pack()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[p], p.grad
        assert gradient is not None
        if not state:
            state |= _zero_state(p)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        numbers = [group["lr"], group["weight_decay"], beta1, beta2, group["eps"]]
        numbers += [1 - beta1**step, 1 - beta2**step]
        scalars = torch.tensor(numbers, dtype=torch.float32).to(p.device, non_blocking=True)
        flat = p.view(-1), gradient.reshape(-1)  # a copy of weights would be updated in their place
        whole = p.numel() // BLOCK
        for first in range(0, whole, SLICE_BLOCKS):
            blocks = slice(first, min(first + SLICE_BLOCKS, whole))
            elements = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
            weights, gradients = (x[elements].view(-1, BLOCK) for x in flat)
            self._kernel(p.device)(weights, gradients, *(state[name][blocks] for name in CODES), scalars)
        if p.numel() % BLOCK:
            rest = slice(whole * BLOCK, None)
            weights, gradients = (_padded(x[rest]) for x in flat)
            rest_of_state = (state[name][whole:] for name in CODES)
            update_blocks(weights, gradients, *rest_of_state, scalars)  # type: ignore[call-arg]
            p.view(-1)[rest] = weights.view(-1)[: p.numel() % BLOCK]

    def _kernel(self, device: torch.device) -> Callable[..., None]:
        """The update as one fused kernel on a GPU."""
        if device.type != "cuda":
            return update_blocks
        if self.compiled is None:
            self.compiled = torch.compile(update_blocks, dynamic=True)
        return self.compiled

    @torch.no_grad()
    def unpack(self, p: Tensor) -> None:
        """Give `p` fp32 moments in its own shape, until the next `pack`; zeros if it had none."""
        state = self.state[p]
        if not state:
            state |= _zero_state(p)
        if "codes" in state:
            codes, codes_sq, scale, scale_sq = (state.pop(name) for name in CODES)
            state["exp_avg"] = dequantize(codes, scale).view(-1)[: p.numel()].view_as(p)
            state["exp_avg_sq"] = dequantize_sq(codes_sq, scale_sq).view(-1)[: p.numel()].view_as(p)

    @torch.no_grad()
    def pack(self) -> None:
        """Put unpacked moments back into 8 bits."""
        for state in self.state.values():
            if "exp_avg" in state:
                state["codes"], state["scale"] = quantize(_padded(state.pop("exp_avg").view(-1)))
                state["codes_sq"], state["scale_sq"] = quantize_sq(_padded(state.pop("exp_avg_sq").view(-1)))


def update_blocks(
    p: Tensor, grad: Tensor, codes: Tensor, codes_sq: Tensor, scale: Tensor, scale_sq: Tensor, scalars: Tensor
) -> None:
    """AdamW on blocks (K, 256), all in place. scalars: lr, weight decay, β1, β2, ε, 1 - β1ᵗ, 1 - β2ᵗ."""
    lr, weight_decay, beta1, beta2, eps, correction, correction_sq = scalars.unbind()
    mean = dequantize(codes, scale) * beta1 + grad * (1 - beta1)
    square = dequantize_sq(codes_sq, scale_sq) * beta2 + grad * grad * (1 - beta2)
    step = (mean / correction) / ((square / correction_sq).sqrt() + eps)
    p.copy_(p * (1 - lr * weight_decay) - lr * step)
    results = (*quantize(mean), *quantize_sq(square))
    for target, value in zip((codes, scale, codes_sq, scale_sq), results, strict=True):
        target.copy_(value)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (K, 256) fp32 → int8 codes (K, 256) and scale (K, 1)."""
    scale = x.abs().amax(-1, keepdim=True)
    share = (x.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    return (x.sign() * (share * 127).round()).to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """int8 codes (K, 256) and scale (K, 1) → fp32 (K, 256)."""
    share = codes.float() / 127
    return share * share.abs() * scale


def quantize_sq(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (K, 256) fp32, not negative → uint8 codes and scale (K, 1); what is above 0 stays above 0."""
    scale = x.amax(-1, keepdim=True)
    share = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).sqrt().sqrt()
    return torch.maximum((share * 255).round(), (x > 0).float()).to(torch.uint8), scale


def dequantize_sq(codes: Tensor, scale: Tensor) -> Tensor:
    """uint8 codes (K, 256) and scale (K, 1) → fp32 (K, 256)."""
    share = codes.float() / 255
    return (share * share) * (share * share) * scale


def _zero_state(p: Tensor) -> dict[str, Tensor]:
    blocks = -(-p.numel() // BLOCK)
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "codes": torch.zeros(blocks, BLOCK, dtype=torch.int8, device=p.device),
        "codes_sq": torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=p.device),
        "scale": torch.zeros(blocks, 1, device=p.device),
        "scale_sq": torch.zeros(blocks, 1, device=p.device),
    }


def _padded(x: Tensor) -> Tensor:
    """Flat (E,) → (K, 256), filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
