"""Speed of evaluation against the model's forward pass: what windows, packing and tallies cost.

    python -m scripts.benchmark_evaluation checkpoint=outputs/x
    python -m scripts.benchmark_evaluation checkpoint=outputs/x window=streaming seq_len=16384

Times `eval.py`'s loop over the validation documents of the run's own data, their tokens in memory, and the
model called on the same number of tokens, in turns. Prints medians and the peak of memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from models.transnormer import DecodeState, TransNormer
from training.command import run_command
from training.distributed import World, process_group
from training.errors import SettingError
from training.evaluation import WINDOWS, evaluate, resolve_stride
from training.evaluation_text import default_length, open_text
from training.metrics import peak_memory_gib
from training.weights import find_model, load_model


@dataclass(kw_only=True, slots=True)
class BenchmarkEvaluationConfig:
    """What to score, and how often."""

    checkpoint: str | None = None  # run folder, checkpoint, import or export
    seq_len: int | None = None  # tokens; null: the length trained on, or of the longest document
    window: str = "disjoint"  # disjoint, strided or streaming
    max_tokens: int = 0  # score the first so many tokens; 0 for all
    batch_tokens: int = 16384  # tokens of a forward pass (at least one window), and of a streamed chunk
    repeats: int = 5  # of each measurement; the median counts

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise SettingError(f"window={self.window!r} is unknown. Allowed: {', '.join(WINDOWS)}.")
        for key in ("seq_len", "batch_tokens", "repeats"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise SettingError(f"{key}={getattr(self, key)} must be at least 1.")


def main(config: BenchmarkEvaluationConfig) -> None:
    """Print both speeds in tokens/s."""
    path = find_model(config.checkpoint)
    with process_group(timeout_minutes=5) as world:
        if world.size > 1:
            raise SettingError(f"{world.size} ranks: this times one. Start it without a launcher.")
        _compare(config, path, world)


def _compare(config: BenchmarkEvaluationConfig, path: Path, world: World) -> None:
    trained = load_model(path, world.device)
    model = trained.model
    text = open_text(None, trained, config.max_tokens, {}, partial(print, file=sys.stderr))
    documents, seq_len = text.documents, config.seq_len or default_length(trained, text)
    streams = config.window == "streaming"
    batch = min(seq_len, config.batch_tokens) if streams else max(config.batch_tokens, seq_len)
    scored = sum(len(document.ids) - 1 for document in documents)
    stride = resolve_stride(seq_len, config.window, None)
    num_passes = max(1, round(scored * (seq_len / stride if stride else 1) / batch))
    score = partial(evaluate, model, documents, seq_len, world, window=config.window, batch_tokens=batch)
    forward = partial(_forward, model, batch, num_passes, streams, world.device)
    sides: tuple[tuple[Callable, list[float]], ...] = ((score, []), (forward, []))
    for turn in range(config.repeats + 1):
        for side, seconds in sides:
            start = time.perf_counter()
            side()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first compiles
                seconds.append(time.perf_counter() - start)
    ours, floor = (statistics.median(seconds) for _, seconds in sides)
    speeds = scored / ours, num_passes * batch / floor
    print(
        f"{len(documents)} documents, {scored:,} tokens, window={config.window} seq_len={seq_len}: "
        f"{speeds[0]:,.0f} tokens/s; the model alone, {num_passes} passes of {batch:,} tokens: "
        f"{speeds[1]:,.0f} tokens/s. Medians of {config.repeats}; "
        f"peak {peak_memory_gib(world.device):.2f} GiB."
    )


@torch.no_grad()
def _forward(model: TransNormer, batch: int, num_passes: int, streams: bool, device: torch.device) -> None:
    """The model on random tokens, losses of every token left on the device."""
    ids = torch.randint(model.config.num_ids, (1, batch + 1), device=device)
    state = {"state": DecodeState()} if streams else {}
    for _ in range(num_passes):
        model(ids[:, :-1], ids[:, 1:], reduction="none", **state)


if __name__ == "__main__":
    run_command(main, BenchmarkEvaluationConfig, __doc__)
