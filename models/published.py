"""The fields of a published `config.json` and the `ModelConfig` they stand for, both ways.

The published checkpoints name their sizes `decoder_embed_dim`, `glu_dim` and so on. What those checkpoints
never vary (attention, decay, gate, channel mixer) has fields of ours beside them, and the published value is
the default of each.
"""

from __future__ import annotations

from typing import Any

from models.config import ModelConfig

# published field -> ModelConfig's
SIZES = {
    "vocab_size": "vocab_size",
    "decoder_embed_dim": "hidden_size",
    "decoder_layers": "num_layers",
    "decoder_attention_heads": "num_heads",
    "glu_dim": "glu_size",
}
# the same name on both sides; absent means ModelConfig's default
SHARED = (
    "init_std",
    "attention",
    "softmax_every",
    "decay",
    "decay_layer_scaling",
    "gate",
    "output_norm",
    "channel_mixer",
    "rope_base",
    "dropout",
)
NORMS = {"simplermsnorm": "srmsnorm", "rmsnorm": "rmsnorm", "layernorm": "layernorm"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "none": "none"}  # swish is silu by its older name
FIELDS = (
    *SIZES,
    *SHARED,
    "hidden_dim",
    "gate_dim",
    "no_scale_embedding",
    "linear_use_lrpe_list",
    "linear_act_fun",
    "norm_type",
    "bias",
    "tie_word_embeddings",
)


def published_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe the architecture."""
    fields = {name: getattr(config, ours) for name, ours in SIZES.items()}
    fields |= {name: getattr(config, name) for name in SHARED}
    return fields | {
        "hidden_dim": config.hidden_size,
        "gate_dim": config.gate_size,
        "no_scale_embedding": not config.scale_embedding,
        "linear_use_lrpe_list": [int(config.uses_lrpe(layer)) for layer in range(config.num_layers)],
        "linear_act_fun": config.activation,
        "norm_type": next(name for name, ours in NORMS.items() if ours == config.norm),
        "bias": False,
        "tie_word_embeddings": config.tie_embeddings,
    }


def model_config_from_published(fields: dict[str, Any], name: str = "imported") -> ModelConfig:
    """The architecture that the fields of a `config.json` describe; other fields are not looked at.

    Raises:
        ValueError: names a field that is missing, or has a value that this architecture does not know.
    """
    missing = [field for field in SIZES if type(fields.get(field)) is not int]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, each a whole number.")
    settings = {ours: fields[field] for field, ours in SIZES.items()}
    settings |= {field: fields[field] for field in SHARED if field in fields}
    if fields.get("hidden_dim", fields["decoder_embed_dim"]) != fields["decoder_embed_dim"]:
        raise ValueError(f"hidden_dim={fields['hidden_dim']} differs from decoder_embed_dim: not supported.")
    if _flag(fields, "bias", False):
        raise ValueError("bias=true is not supported: the layers have no biases.")
    if "gate_dim" in fields:
        settings["gate_size"] = fields["gate_dim"]
    try:
        return ModelConfig(
            name=name,
            tie_embeddings=_flag(fields, "tie_word_embeddings", True),
            scale_embedding=not _flag(fields, "no_scale_embedding", False),
            lrpe=_lrpe(fields.get("linear_use_lrpe_list"), fields["decoder_layers"]),
            activation=_choice(fields, "linear_act_fun", "silu", ACTIVATIONS),
            norm=_choice(fields, "norm_type", "simplermsnorm", NORMS),
            **settings,
        )
    except TypeError as error:
        raise ValueError(f"a field has a value of the wrong type ({error}).") from None


def _flag(fields: dict[str, Any], field: str, default: bool) -> bool:
    value = fields.get(field, default)
    if type(value) is not bool:
        raise ValueError(f"{field}={str(value)[:40]!r} must be true or false.")
    return value


def _choice(fields: dict[str, Any], field: str, default: str, allowed: dict[str, str]) -> str:
    value = fields.get(field, default)
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is unknown. Allowed: {', '.join(allowed)}.")
    return allowed[value]


def _lrpe(flags: Any, num_layers: int) -> str:
    """Which layers use LRPE, from one flag per layer; no list is the published default, the first layer."""
    for name in ("first", "all", "none"):
        wanted = [int(name == "all" or (name == "first" and layer == 0)) for layer in range(num_layers)]
        if flags == wanted or (flags is None and name == "first"):
            return name
    raise ValueError(
        f"linear_use_lrpe_list={str(flags)[:80]} is not supported. "
        f"Allowed: {num_layers} flags that are all 1, all 0, or 1 for the first layer only."
    )
