"""Running out of memory: how an error says so, and what to try then."""

from __future__ import annotations

from training.train_config import CHUNKS_NEED, TrainConfig

CHUNK_TOKENS = 32768  # what is suggested for engine.sequence_chunk
# What errors say where a GPU or the CPU has no memory left.
OUT_OF_MEMORY = ("MemoryError", "out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU had no memory left."""
    text = f"{type(error).__name__}: {error}"
    return any(words in text for words in OUT_OF_MEMORY)


def ways_to_fit(config: TrainConfig, is_started: bool = False) -> str:
    """What to try where a run does not fit; of one that is started, what may still change."""
    engine, model, sequences = config.engine, config.model, config.micro_batch_size
    ways = []
    if not is_started:
        ways += ["a smaller micro_batch_size"] if sequences != 1 else []
        ways += ["optim=adamw_8bit"] if config.optim.name != "adamw_8bit" else []
        ways += ["model.activation_checkpointing=selective or full"]
    longest = config.seq_len * (1 if sequences == "auto" else sequences)
    can_be_cut = all(getattr(model, key) == value for key, value in CHUNKS_NEED.items())
    if can_be_cut and engine.sequence_chunk == 0 and longest > CHUNK_TOKENS:
        ways += [f"engine.sequence_chunk={CHUNK_TOKENS}"]
    if not engine.offloads and config.optim.name != "muon":
        ways += [f"engine=zero{max(engine.zero_stage, 2)}_offload"]
    ways += [] if is_started else ["a shorter seq_len"]
    *others, last = [*ways, "more GPUs with engine=zero3"]
    return f"{', '.join(others)}, or {last}" if others else last
