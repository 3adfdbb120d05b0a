"""What a run needs of a GPU's memory, counted from its settings.

`memory_parts` is the whole estimate, by part and in bytes. It is meant to be a little too high: a run that
was told to fit must not run out of memory. `engine.precision=auto` counts as bf16, for which every GPU on
record has units.
Shapes in comments: D hidden, G inner width of the channel mixer, H heads, d head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from models.config import ModelConfig
from models.layers import LOGITS_PER_CHUNK
from training.adamw_8bit import BLOCK
from training.train_config import EngineConfig, TrainConfig

BUCKET_ELEMENTS = 5e8  # DeepSpeed's buffer for gradients on their way to their owner, stages 2 and 3
LIVE_PARAMETERS = 1e9  # whole weights that stage 3 may hold at once
# The ZeRO stage from which each part is divided among the ranks.
SHARDED_FROM_STAGE = {"masters": 1, "moments": 1, "sums": 2, "gradients": 3, "weights": 3}


def layer_activation_bytes(
    config: ModelConfig, layer: int, element: int = 2, compiled: bool = False
) -> dict[str, int]:
    """Bytes per token that a layer's forward keeps for its backward, by term.

    `element` is the size of a compute value, 2 in bf16. `compiled` blocks keep a norm's input as it is
    instead of its fp32 copy, and recompute the results of the output norm and SiLU.
    """
    hidden, glu = config.hidden_size, config.glu_size
    norm = norm_activation_bytes(config, element, compiled)
    if config.activation_checkpointing == "selective":
        widths = 5 if config.uses_softmax(layer) else 6 if config.gate == "none" else 7
        return {"input, projections, attention": element * widths * hidden, "l1, l2": element * 2 * glu}
    terms = {"token norm": norm}
    if config.uses_softmax(layer):
        terms["q, k, v"] = element * 3 * hidden
        terms["rotated q, k"] = element * 2 * hidden
        terms["attention output"] = element * hidden
    else:
        features = config.num_heads * config.qk_dim(layer)  # H·d, twice that after LRPE
        terms["q, k, v, gate"] = element * hidden * (3 if config.gate == "none" else 4)
        terms["activated q, k"] = element * 2 * hidden if config.activation != "none" else 0
        terms["LRPE's q, k"] = element * 2 * features if config.uses_lrpe(layer) else 0
        terms["output norm"] = element * hidden if compiled else norm
        terms["gated output"] = element * hidden if config.gate != "none" else 0
    terms["channel norm"] = norm
    # l1, l2, their product, and SiLU's result unless compiled blocks recompute it
    terms["channel mixer"] = element * glu * (4 if config.channel_mixer == "swiglu" and not compiled else 3)
    return terms


def norm_activation_bytes(config: ModelConfig, element: int = 2, compiled: bool = False) -> int:
    """Bytes per token that a norm keeps: its fp32 input (with a weight the scaled one too), its result."""
    if compiled:
        return 2 * element * config.hidden_size
    wide = 2 if config.norm == "rmsnorm" else 1
    return 4 * wide * config.hidden_size + element * config.hidden_size


def activation_bytes_per_token(config: ModelConfig, element: int = 2, compiled: bool = False) -> int:
    """Bytes that one token's activations hold at the peak, when backward enters the last layer.

    Every layer keeps its terms, and the layer in backward holds as much again, its gradients (or its terms,
    recomputed). With `activation_checkpointing=full` every layer keeps its input; the one in backward holds
    its terms and the gradients of the channel mixer, which are the largest.
    """
    whole = replace(config, activation_checkpointing="none")
    layers = range(config.num_layers)
    working = max(sum(layer_activation_bytes(whole, layer, element, compiled).values()) for layer in layers)
    last_norm = norm_activation_bytes(config, element, compiled)
    if config.activation_checkpointing == "full":
        gradients = 2 * element * (config.glu_size + config.hidden_size)
        return element * config.hidden_size * config.num_layers + working + gradients + last_norm
    kept = sum(sum(layer_activation_bytes(config, layer, element, compiled).values()) for layer in layers)
    return kept + working + last_norm


def loss_bytes(config: ModelConfig, num_tokens: int, element: int = 2) -> int:
    """Bytes that the head's loss holds on a GPU for a micro-batch of `num_tokens` tokens.

    A chunk's logits, which their gradient overwrites; the gradients of the features, before and after they
    are scaled; and that of the head: its fp32 sum, the sum rounded, and a chunk's part of it.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    assert vocab is not None, "fill it in by with_vocabulary"
    chunk_tokens = min(num_tokens, max(1, LOGITS_PER_CHUNK // vocab))
    logits = element * chunk_tokens * vocab
    return logits + 2 * element * num_tokens * hidden + (4 + 2 * element) * vocab * hidden


def state_parts(config: TrainConfig, num_ranks: int, with_sums: bool = True) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer state on one rank, by part (see training/engine.py).

    Stage 2, and stage 1 in fp32, turn each gradient into a part of its fp32 sum as it comes; stage 1 in bf16
    holds the sums all the time, and after a step's first backward pass the bf16 gradients as well.
    `with_sums=False` is the time before that pass.
    """
    engine, count = config.engine, config.model.num_parameters()
    stage = engine.zero_stage
    holds_sums = stage == 3 or holds_both_gradients(engine)
    holds_gradients = stage in (0, 3) or (holds_both_gradients(engine) and with_sums)
    element = 4 if engine.precision == "fp32" or stage == 0 else 2
    sharded = {name: num_ranks if stage >= least else 1 for name, least in SHARDED_FROM_STAGE.items()}
    on_gpu = 0 if engine.offload_optimizer else 1
    sums = 4 if holds_sums or (stage > 0 and with_sums) else 0
    copies = 2 if stage == 0 and engine.precision != "fp32" else 0  # every layer rounds its weight for bf16
    parts = {
        "weights": (element + copies) * count / sharded["weights"],
        "gradients": element * count / sharded["gradients"] if holds_gradients else 0,
        "fp32 gradient sums": sums * count / sharded["sums"] * on_gpu,
        "fp32 master weights": 4 * count / sharded["masters"] * on_gpu if stage > 0 else 0,
        "optimizer moments": moment_bytes(config) / sharded["moments"] * on_gpu,
        "communication buffers": 0,
    }
    if stage == 3 and engine.offload_parameters:
        parts["weights"] = 0
    if stage >= 2:
        parts["communication buffers"] += element * BUCKET_ELEMENTS
    if stage == 3:
        parts["communication buffers"] += element * min(count, LIVE_PARAMETERS)
    return parts


def holds_both_gradients(engine: EngineConfig) -> bool:
    """Whether gradients are kept beside their fp32 sums: by DeepSpeed's stage 1 in bf16, its own class."""
    return engine.zero_stage == 1 and engine.precision != "fp32"


def moment_bytes(config: TrainConfig) -> float:
    """Bytes of the optimizer's moments over all ranks."""
    count = config.model.num_parameters()
    if config.optim.name == "adamw_8bit":
        return count * (2 + 8 / BLOCK)  # two codes an element, two scales a block
    if config.optim.name == "muon":  # one moment for the matrices of the blocks
        return 4 * count + 4 * config.model.parameter_parts()["embedding and head"]
    return 8 * count


def memory_parts(config: TrainConfig, num_ranks: int, micro_batch_size: int) -> dict[str, float]:
    """The estimate: bytes on one GPU at the peak of a step, by part. Needs `model.vocab_size`.

    The peak is where backward begins, or with few tokens the update, which may copy gradients, or with many
    ranks the start.

    Args:
        num_ranks: GPUs that share a step.
        micro_batch_size: sequences per GPU and micro-step.
    """
    element = 4 if config.engine.precision == "fp32" else 2
    num_tokens, chunk_tokens = micro_batch_size * config.seq_len, config.engine.sequence_chunk
    is_cut = 0 < chunk_tokens < num_tokens
    num_tokens = chunk_tokens if is_cut else num_tokens
    has_sums = is_cut or micro_batch_size < config.sequences_per_step // num_ranks
    compiled = config.engine.compile != "false"
    backward = {
        **state_parts(config, num_ranks, has_sums),
        "copied gradients": 0,
        "activations": activation_bytes_per_token(config.model, element, compiled) * num_tokens,
        "loss": loss_bytes(config.model, num_tokens, element),
    }
    update = {**state_parts(config, num_ranks), "copied gradients": 0, "activations": 0, "loss": 0}
    copies = config.engine.zero_stage in (1, 2) and not holds_both_gradients(config.engine)
    if copies and not config.engine.offload_optimizer:
        update["copied gradients"] = 4 * config.model.num_parameters() / num_ranks
    # at stage 3 too, which shards them afterwards
    start = {"weights, all at first": float(element * config.model.num_parameters())}
    return max(backward, update, start, key=lambda parts: sum(parts.values()))
