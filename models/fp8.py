"""Linear maps of the blocks with fp8 products while training (Micikevicius et al. 2022, arXiv 2209.05433).

Each operand is scaled by its largest magnitude, found anew at every product, and rounded: weights and inputs
to e4m3 (3 bits of mantissa), gradients to e5m2 (2 bits and more range). Sums are fp32, results bf16. The
head, the embedding and everything that is not a matrix product stay as they are; so does evaluation.
Shapes: T tokens, K input and M output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Linear

MIN_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
MULTIPLE = 16  # of every dimension of a product
MIN_FEATURES = 128  # a narrower map (a low-rank gate) gains nothing


class Fp8Linear(Linear):
    """`Linear` whose three products run in fp8 in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        product = Fp8Product.apply(x.flatten(0, -2), self.weight.to(x.dtype))
        return product.unflatten(0, x.shape[:-1])


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Turn the linear maps of a TransNormer's blocks into fp8 ones; a CPU computes the same numbers, slowly.

    Raises:
        ValueError: the GPU has no units for it.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise ValueError(
            f"engine.fp8=true needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell); {name} "
            f"has {major}.{minor}. Use engine.fp8=false."
        )
    for module in model.get_submodule("model.layers").modules():
        if type(module) is not Linear or min(module.weight.shape) < MIN_FEATURES:
            continue
        if any(size % MULTIPLE for size in module.weight.shape):
            raise ValueError(
                f"engine.fp8=true needs model.hidden_size and model.glu_size to be multiples of {MULTIPLE}; "
                f"a linear map has {tuple(module.weight.shape)}. Use engine.fp8=false."
            )
        module.__class__ = Fp8Linear


class Fp8Product(torch.autograd.Function):
    """x (T, K) and weight (M, K) → x @ weight.T (T, M) in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x8, x_scale = to_fp8(x, torch.float8_e4m3fn)
        weight8, weight_scale = to_fp8(weight, torch.float8_e4m3fn)
        return scaled_product(x8, weight8.T, x_scale, weight_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        missing = -x.shape[0] % MULTIPLE  # tokens are summed over: zeros add nothing
        x, padded_grad = (F.pad(y, (0, 0, 0, missing)) if missing else y for y in (x, grad))
        x8, x_scale = to_fp8(x, torch.float8_e4m3fn)
        weight8, weight_scale = to_fp8(weight, torch.float8_e4m3fn)
        grad8, grad_scale = to_fp8(padded_grad, torch.float8_e5m2)
        grad_x = scaled_product(
            grad8[: len(grad)], _by_columns(weight8), grad_scale, weight_scale, x.dtype, fast=False
        )
        grad_weight = scaled_product(
            grad8.T.contiguous(), _by_columns(x8), grad_scale, x_scale, weight.dtype, fast=False
        )
        return grad_x, grad_weight


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x → its rounded multiple of `dtype`, and the fp32 scale () that gives x back."""
    largest = torch.finfo(dtype).max
    scale = (x.abs().amax().float() / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def scaled_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """(a · a_scale) @ (b · b_scale) of fp8 operands, a in rows and b in columns.

    `fast` leaves partial sums in the matrix units' own registers for longer, which rounds them more.
    """
    if not a.is_cuda:
        return ((a.float() @ b.float()) * (a_scale * b_scale)).to(dtype)
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


def _by_columns(x: Tensor) -> Tensor:
    """The same matrix with consecutive elements of a column side by side."""
    return x.T.contiguous().T
