"""Layers shared by every decoder: linear map, norms, gated linear units, and the head with its loss.

Shapes: B batch, N sequence, D hidden, V vocabulary, T tokens (B·N flattened).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import cross_entropy
from kernels.reference import without_autocast
from models.config import ModelConfig

SCALED_ROWS = 8192  # of a gradient, multiplied at once in fp32
LOGITS_PER_CHUNK = 2**28  # logits held at once by the loss: 512 MiB in bf16


def cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · frequency, fp32: positions (B or 1, N), frequencies (…) → (B or 1, N, …).

    Whole turns are dropped in fp64, so angles are exact at any position.
    """
    turns = positions.double()[(..., *[None] * frequencies.ndim)] * (frequencies.double() / (2 * math.pi))
    angles = ((turns - turns.round()) * (2 * math.pi)).float()
    return angles.cos(), angles.sin()


class Linear(nn.Linear):
    """A linear map without bias that computes in the dtype of its input.

    With fp32 weights and a bf16 input (`engine=zero0`) the weight is rounded for the product and its
    gradient is accumulated in fp32; with weights of the input's dtype nothing is converted.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: the model draws all weights from its seed (TransNormer.initialize)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class SRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) over the last dimension in fp32, with no weight (arXiv 2307.14995, eq. 8)."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class RMSNorm(SRMSNorm):
    """SRMSNorm with a learnt weight per feature."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * self.weight.to(x.dtype).float()).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.to(x.dtype).float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that `config.norm` names, over the hidden width."""
    if config.norm == "srmsnorm":
        return SRMSNorm()
    return (RMSNorm if config.norm == "rmsnorm" else LayerNorm)(config.hidden_size)


class GatedLinearUnit(nn.Module):
    """Channel mixer l3(f(l1 x) * l2 x): SGLU with f the identity (arXiv 2307.14995), SwiGLU with f = SiLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.swish = config.channel_mixer == "swiglu"
        self.l1 = Linear(config.hidden_size, config.glu_size)
        self.l2 = Linear(config.hidden_size, config.glu_size)
        self.l3 = Linear(config.glu_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.l1(x)
        return self.l3((F.silu(gate) if self.swish else gate) * self.l2(x))


class Embedding(nn.Embedding):
    """Token embedding, multiplied by sqrt(D) where the model asks for it, in `dtype` or the weight's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.num_ids, config.hidden_size)
        self.scale = config.hidden_size**0.5 if config.scale_embedding else 1.0

    def forward(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        weight = self.weight
        dtype = dtype or weight.dtype
        if torch.is_grad_enabled():
            weight = weight.to(dtype)  # so that the gradient of an fp32 weight is rounded as a bf16 one's
            if not weight.is_cuda:
                weight = weight.float()  # a CPU sums the gradients of a token's places in the weight's dtype
        return F.embedding(tokens, weight).to(dtype) * self.scale


class LMHead(Linear):
    """Final projection to the vocabulary: logits, or the loss without ever holding all logits."""

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """
        Args:
            x: (B, N, D).
            targets: (B, N) int64, `IGNORED` where not scored; None for logits.
            reduction: "sum" for the scalar loss in nats over scored targets, "none" for one loss a
                token, (B, N) and without gradients.

        Returns:
            logits (B, N, V) in x's dtype, or the fp32 loss.
        """
        if targets is None:
            return super().forward(x)
        if reduction not in ("sum", "none"):
            raise ValueError(f"reduction={reduction!r} is unknown. Allowed: sum, none.")
        return _linear_cross_entropy(x, self.weight.to(x.dtype), targets, reduction)


@without_autocast
def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The loss of logits x @ weight.T, which are never held whole; see LMHead.forward."""
    flat = x.flatten(0, 1)
    if reduction == "none" or not torch.is_grad_enabled():
        chunks = _logits_in_chunks(flat, weight, targets.flatten())
        losses = [cross_entropy(logits, part, with_gradient=False) for logits, part, _ in chunks]
        return torch.cat(losses).view_as(targets) if reduction == "none" else torch.cat(losses).sum()
    return LinearCrossEntropy.apply(flat, weight, targets.flatten())


def _logits_in_chunks(x: Tensor, weight: Tensor, targets: Tensor):
    """Yield logits (C, V), targets (C,) and the slice they stand for, for successive chunks of tokens."""
    chunk_tokens = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    for start in range(0, len(x), chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, len(x)))
        yield x[rows] @ weight.T, targets[rows], rows


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of x @ weight.T, in chunks of tokens.

    The gradients are formed beside the loss, while a chunk's logits exist, so the logits are computed
    once and never kept. x (T, D), weight (V, D), targets (T,) int64; returns the fp32 sum in nats.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for logits, chunk_targets, rows in _logits_in_chunks(x, weight, targets):
            total += cross_entropy(logits, chunk_targets, with_gradient=True).sum()
            torch.mm(logits, weight, out=grad_x[rows])  # logits hold their gradient now
            grad_weight += logits.T @ x[rows]
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return _scaled(grad_x, grad), _scaled(grad_weight, grad), None


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a factor () in fp32, rounded once: a GPU would round the factor itself to x's dtype before."""
    scaled = torch.empty_like(x)
    for result, rows in zip(scaled.split(SCALED_ROWS), x.split(SCALED_ROWS), strict=True):
        result.copy_(rows.float() * factor)
    return scaled
