"""Layers shared by every decoder: linear map, norms, gated linear units, and the head with its loss.

Shapes: B batch, N sequence, D hidden, V vocabulary, T tokens (B·N flattened).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig

IGNORED = -100  # a target that is not scored
LOGITS_PER_CHUNK = 2**27  # fp32 logits held at once by the loss: 512 MiB


class Linear(nn.Linear):
    """A linear map without bias that computes in the dtype of its input.

    With fp32 weights and a bf16 input (`engine=zero0`) the weight is rounded for the product and its
    gradient is accumulated in fp32; with weights of the input's dtype nothing is converted.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

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
        return (scaled * self.weight.float()).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
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
    """Token embedding, multiplied by sqrt(D) where the model asks for it, rounded to `dtype`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = config.hidden_size**0.5 if config.scale_embedding else 1.0

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return super().forward(tokens).to(dtype) * self.scale


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
        weight = self.weight.to(x.dtype)
        if reduction == "none" or not torch.is_grad_enabled():
            chunks = _chunk_losses(x.flatten(0, 1), weight, targets.flatten())
            losses = torch.cat([losses for _, losses in chunks])
            return losses.view_as(targets) if reduction == "none" else losses.sum()
        return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten())


def _chunk_losses(x: Tensor, weight: Tensor, targets: Tensor):
    """Yield (logits fp32 (C, V), losses fp32 (C,)) for successive chunks of tokens."""
    chunk_tokens = max(1, LOGITS_PER_CHUNK // weight.shape[0])
    for x_chunk, target_chunk in zip(x.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = (x_chunk @ weight.T).float()
        yield logits, F.cross_entropy(logits, target_chunk, ignore_index=IGNORED, reduction="none")


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
        start = 0
        for logits, losses in _chunk_losses(x, weight, targets):
            total += losses.sum()
            stop = start + len(losses)
            scored = targets[start:stop] != IGNORED
            probabilities = logits.softmax(-1)
            probabilities[torch.arange(len(losses), device=x.device), targets[start:stop].clamp_min(0)] -= 1.0
            grad_logits = (probabilities * scored[:, None]).to(x.dtype)
            torch.mm(grad_logits, weight, out=grad_x[start:stop])
            grad_weight += grad_logits.T @ x[start:stop]
            start = stop
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None
