"""The architecture's settings, and the counts that follow from them.

`ModelConfig` describes every model in this repository: TransNormerLLM, the ablations of its paper,
hybrid stacks, and the Llama baseline, which differ only in the values below.
Sizes are in features (D hidden, H heads, d = D / H head dim) or tokens (V vocabulary).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_type_hints

# One chunk length for all FLOP counts, whatever the kernel uses, so that figures stay comparable.
FLOP_CHUNK_TOKENS = 64
MAX_LAYERS = 1000

CHOICES = {
    "attention": ("lightning", "quadratic", "softmax"),
    "decay": ("published", "paper", "none"),
    "lrpe": ("first", "all", "none"),
    "activation": ("silu", "none"),
    "gate": ("full", "low_rank", "none"),
    "norm": ("srmsnorm", "rmsnorm", "layernorm"),
    "output_norm": ("hidden", "head"),
    "channel_mixer": ("sglu", "swiglu"),
    "backend": ("auto", "triton", "torch", "reference"),
    "activation_checkpointing": ("none", "selective", "full"),
}


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Settings of one decoder. The defaults are those of TransNormerLLM (arXiv 2307.14995).

    Raises:
        ValueError: names the dotted key (`model.num_heads`), the value and what is allowed.
    """

    name: str = "tnl-tiny"  # for tables and logs
    vocab_size: int | None = None  # V; null takes the tokenizer's
    hidden_size: int = 256  # D
    num_layers: int = 4
    num_heads: int = 4  # H
    glu_size: int = 704  # inner width of the channel mixer
    tie_embeddings: bool = True  # the head uses the embedding's weight
    scale_embedding: bool = True  # multiply embeddings by sqrt(D)

    attention: str = "lightning"  # quadratic: Lightning Attention-1's left product; softmax: Llama
    softmax_every: int = 0  # hybrid: every k-th layer uses softmax attention; 0 for none
    decay: str = "published"  # published: ALiBi slopes; paper: exp(-8h/H (1 - l/L)); none: 1
    decay_layer_scaling: bool = True  # slopes shrink to nearly 0 at the last layer
    lrpe: str = "first"  # layers with linearized relative positional encoding: first, all, none
    activation: str = "silu"  # on q and k: silu or none
    gate: str = "full"  # low_rank: TNL3's D -> gate_size -> D; or none
    gate_size: int = 16
    norm: str = "srmsnorm"  # or rmsnorm, layernorm
    output_norm: str = "hidden"  # of attention's output: over the hidden width; head: in each head by itself
    channel_mixer: str = "sglu"  # or swiglu, with SiLU on the gate
    rope_base: float = 10000.0  # softmax layers only

    init_std: float = 0.02
    dropout: float = 0.0  # on the embedding and on both residual branches
    backend: str = "auto"  # of linear attention: auto, triton, torch; of lightning also reference
    activation_checkpointing: str = "none"  # selective: recompute all but products and attention; or full

    def __post_init__(self) -> None:
        for key, kind in get_type_hints(ModelConfig).items():
            value = getattr(self, key)
            fits = isinstance(value, (int, float) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):  # a bool is an int to Python
                raise ValueError(
                    f"model.{key}={str(value)[:80]!r} must be of type {getattr(kind, '__name__', kind)}."
                )
        for key, allowed in CHOICES.items():
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(f"model.{key}={value!r} is unknown. Allowed: {', '.join(allowed)}.")
        for key in ("hidden_size", "num_layers", "num_heads", "glu_size", "gate_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1.")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"model.num_layers={self.num_layers} must be at most {MAX_LAYERS}.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(
                f"model.vocab_size={self.vocab_size} must be at least 1, or null to follow the tokenizer."
            )
        if self.softmax_every < 0:
            raise ValueError(
                f"model.softmax_every={self.softmax_every} must be 0 (none) or a number of layers."
            )
        if self.softmax_every > self.num_layers:
            raise ValueError(
                f"model.softmax_every={self.softmax_every} is above model.num_layers={self.num_layers}: no "
                f"layer would use softmax attention. Allowed: 0 (none) to {self.num_layers}."
            )
        for key in ("init_std", "rope_base"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"model.{key}={getattr(self, key)} must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be at least 0 and below 1.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}."
            )
        if self.output_norm == "head" and self.norm != "srmsnorm":
            raise ValueError(f"model.output_norm=head needs model.norm=srmsnorm, not {self.norm}.")
        if self.attention == "quadratic" and self.backend == "reference":
            raise ValueError(
                "model.backend=reference has no quadratic form. Allowed with model.attention=quadratic: "
                "auto, triton, torch."
            )
        if self.attention == "softmax" and self.head_dim % 2:
            raise ValueError(
                f"model.num_heads={self.num_heads} gives heads of {self.head_dim} features; RoPE turns "
                "pairs of them, so their number must be even: choose another model.num_heads."
            )
        if self.attention != "softmax" and (self.head_dim % 8 or self.qk_dim(0) > 256):
            raise ValueError(
                f"model.num_heads={self.num_heads} gives heads of {self.head_dim} features. The kernel takes "
                "multiples of 8, up to 256 (LRPE doubles q and k): choose another model.num_heads."
            )

    @property
    def num_ids(self) -> int:
        """V, which must be known by now.

        Raises:
            ValueError: `model.vocab_size` is unset and there is no tokenizer to take it from.
        """
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not set, and there is no tokenizer to take it from.")
        return self.vocab_size

    @property
    def head_dim(self) -> int:
        """d: features per head of v and of the output."""
        return self.hidden_size // self.num_heads

    def uses_softmax(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) is softmax attention: all of Llama, every k-th of a hybrid."""
        if self.attention == "softmax":
            return True
        return self.softmax_every > 0 and (layer + 1) % self.softmax_every == 0

    def uses_lrpe(self, layer: int) -> bool:
        """Whether layer `layer` rotates q and k by LRPE, which doubles their width."""
        return self.lrpe == "all" or (self.lrpe == "first" and layer == 0)

    def qk_dim(self, layer: int) -> int:
        """Features per head of q and k as they enter the operator."""
        return self.head_dim * (2 if self.uses_lrpe(layer) else 1)

    def num_parameters(self) -> int:
        """Trainable parameters, a tied head counted once. Needs `vocab_size`."""
        return sum(self.parameter_parts().values())

    def parameter_parts(self) -> dict[str, int]:
        """num_parameters by part of the model."""
        hidden, layers = self.hidden_size, range(self.num_layers)
        linear = [layer for layer in layers if not self.uses_softmax(layer)]
        per_norm = {"srmsnorm": 0, "rmsnorm": hidden, "layernorm": 2 * hidden}[self.norm]
        frequencies = hidden * sum(self.uses_lrpe(layer) for layer in linear)
        return {
            "embedding and head": self.num_ids * hidden * (1 if self.tie_embeddings else 2),
            "token mixers": 4 * hidden**2 * len(layers) + self._gate_weights * len(linear) + frequencies,
            "channel mixers": 3 * hidden * self.glu_size * len(layers),
            "norms": per_norm * (1 + 2 * len(layers) + len(linear)),
        }

    @property
    def _gate_weights(self) -> int:
        """Of the output gate of a layer of linear attention."""
        hidden = self.hidden_size
        return {"full": hidden * hidden, "low_rank": 2 * hidden * self.gate_size, "none": 0}[self.gate]

    def flops_per_token(self, seq_len: float) -> float:
        """Model FLOPs of one token's training step (forward once, backward twice as much).

        Matrix products only, counted from the layers that run: linear attention as chunks of 64
        (2·C·(Dk + Dv) + 4·Dk·Dv a head), quadratic and softmax attention as their causal half
        (N·(Dk + Dv) a head), the head as 2·V·D; the embedding look-up costs nothing.

        Args:
            seq_len: N in tokens, which only quadratic and softmax layers depend on; of packed documents the
                sum of squared lengths over the sum of lengths.
        """
        hidden, heads, head_dim = self.hidden_size, self.num_heads, self.head_dim
        forward = 2.0 * self.num_ids * hidden
        for layer in range(self.num_layers):
            forward += 2 * 3 * hidden * self.glu_size + 2 * 4 * hidden * hidden
            if self.uses_softmax(layer):
                forward += heads * seq_len * 2 * head_dim
                continue
            qk_dim = self.qk_dim(layer)
            forward += 2 * self._gate_weights
            if self.attention == "quadratic":
                forward += heads * seq_len * (qk_dim + head_dim)
            else:
                forward += heads * (2 * FLOP_CHUNK_TOKENS * (qk_dim + head_dim) + 4 * qk_dim * head_dim)
        return 3 * forward
