"""TransNormer: embedding, L pre-norm blocks of token and channel mixer, a last norm, and the head.

`x = x + mixer(norm(x))` twice a block. The names of modules are those of the published checkpoints, so that
`state_dict` keys load without a rename. The same class builds the Llama baseline and hybrid stacks.
Shapes: B batch, N sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.attention import LRPE, GatedLinearAttention
from models.config import ModelConfig
from models.layers import Embedding, GatedLinearUnit, LMHead, make_norm
from models.llama import SoftmaxAttention, rope_rotations

PREFILL_TOKENS = 4096  # a longer prompt is read in chunks of this length
KEPT_RESULTS = (
    "aten.mm.default",
    "aten._scaled_mm.default",
    "aten.amax.default",  # of fp8 operands: a number each
    "lightning_attention.forward.default",
    "lightning_attention.quadratic_forward.default",
    "torch_attn._varlen_attn.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
)


@dataclass
class DecodeState:
    """What generation carries from token to token: passed in and returned, never kept on a module."""

    position: int | Tensor = 0  # tokens seen so far; (B,) int64 where sequences differ
    layers: list[Any] = field(default_factory=list)  # fp32 (B, H, Dk, Dv), or the cache of a softmax layer


class Block(nn.Module):
    """One layer: x + token_mixer(norm(x)), then x + channel_mixer(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.token_norm = make_norm(config)
        softmax = config.uses_softmax(layer)
        self.token_mixer = SoftmaxAttention(config) if softmax else GatedLinearAttention(config, layer)
        self.channel_norm = make_norm(config)
        self.channel_mixer = GatedLinearUnit(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        positions: Any,
        cu_seqlens: Tensor | None,
        state: Any,
        keep_state: bool,
        recompute: str = "none",
    ) -> tuple[Tensor, Any]:
        """x (B, N, D) → (B, N, D) and the next state.

        positions: (B or 1, N), or for a softmax layer its rotations; recompute: activation_checkpointing.
        """
        arguments = (x, positions, cu_seqlens, state, keep_state)
        if recompute == "none":
            return self._mix(*arguments)
        contexts: dict[str, Any] = {"context_fn": _keep_products} if recompute == "selective" else {}
        return checkpoint(self._mix, *arguments, use_reentrant=False, **contexts)

    def _mix(self, x, positions, cu_seqlens, state, keep_state):
        mixed, state = self.token_mixer(self.token_norm(x), positions, cu_seqlens, state, keep_state)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.channel_mixer(self.channel_norm(x))), state


def _keep_products():
    """Selective recomputation: keep what matrix products and attention gave, recompute the rest."""
    return create_selective_checkpoint_contexts(_selective_policy)


def _selective_policy(_, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(operator) in KEPT_RESULTS else CheckpointPolicy.PREFER_RECOMPUTE


class Backbone(nn.Module):
    """Everything but the head: tokens (B, N), or their embeddings (B, N, D) → features (B, N, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config)

    def forward(
        self, tokens: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None, state: DecodeState | None
    ) -> tuple[Tensor, DecodeState | None]:
        start = state.position if state is not None else 0
        positions = token_positions(tokens.shape[1], start, cu_seqlens, tokens.device)
        rotations = None
        if any(map(self.config.uses_softmax, range(len(self.layers)))):
            rotations = rope_rotations(positions, self.config.head_dim, self.config.rope_base)
        x = tokens.to(dtype) if tokens.is_floating_point() else self.embed_tokens(tokens, dtype)
        x = self.dropout(x)
        recompute = self.config.activation_checkpointing if torch.is_grad_enabled() else "none"
        next_layers = []
        for index, block in enumerate(self.layers):
            layer_state = state.layers[index] if state is not None and state.layers else None
            where = rotations if self.config.uses_softmax(index) else positions
            x, layer_state = block(x, where, cu_seqlens, layer_state, state is not None, recompute)
            next_layers.append(layer_state)
        if state is not None:
            lengths = tokens.shape[1] if cu_seqlens is None else cu_seqlens.diff().long()
            state = DecodeState(start + lengths, next_layers)
        return self.final_norm(x), state


class TransNormer(nn.Module):
    """A language model: logits or loss from tokens.

    Example:
        model = TransNormer(ModelConfig(vocab_size=64000))
        loss = model(tokens, targets=targets)          # summed nats, fp32
        logits, state = model(tokens, state=DecodeState())  # prefill; pass `state` back for each next token
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: that of the weights
        self.model = Backbone(config)
        self.lm_head = LMHead(config.hidden_size, config.num_ids)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Normal(0, init_std) for linear maps and the embedding; LRPE's own frequencies."""
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear) and not (
                module is self.lm_head and self.config.tie_embeddings
            ):
                module.weight.normal_(0.0, self.config.init_std, generator=generator)
            elif isinstance(module, LRPE):
                module.theta.copy_(module.initial_theta())

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        state: DecodeState | None = None,
        reduction: str = "sum",
        last_only: bool = False,
    ):
        """
        Args:
            tokens: (B, N) int64.
            targets: (B, N) int64, -100 where not scored; None for logits.
            cu_seqlens: (num_sequences + 1,) int32, B = 1: sequences packed one after another; attention
                and positions restart at each.
            state: carries sequences over several calls; given and returned. With cu_seqlens, one part of
                it belongs to each packed sequence; softmax layers then take it with cu_seqlens again only.
            reduction: of the loss, "sum" or "none" (per token, no gradients).
            last_only: give logits of the last token only, (B, 1, V).

        Returns:
            With `targets`, the fp32 loss in nats: a scalar, or (B, N) for "none". Otherwise logits
            (B, N, V). With `state`, a pair of that and the next state.
        """
        dtype = self.compute_dtype or self.lm_head.weight.dtype
        x, next_state = self.model(tokens, dtype, cu_seqlens, state)
        out = self.lm_head(x[:, -1:] if last_only else x, targets, reduction)
        return out if state is None else (out, next_state)


def token_positions(
    length: int, start: int | Tensor, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Position of each token in its own sequence, (1 or B, N) int64.

    Args:
        start: tokens that each sequence has had before: one number, or (num_sequences,) int64.
    """
    index = torch.arange(length, device=device)
    if cu_seqlens is None:
        return index + (start[:, None] if isinstance(start, Tensor) else start)
    sequence = torch.searchsorted(cu_seqlens, index, right=True) - 1
    start = start[sequence] if isinstance(start, Tensor) else start
    return (index - cu_seqlens[sequence] + start)[None]
