"""Time candidate launches of the plain Triton kernels, to fill the table in kernels/launch.py.

    python -m scripts.tune_kernels                       the candidates of D = 128 at three lengths
    python -m scripts.tune_kernels head_dim=64 heads=32 lengths=[2048]

A candidate that fails to compile or crashes the device is reported and left out; each run of candidates lives
in a process that can be replaced, since a CUDA error stays. Times are medians under sustained load.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, field

import torch

from kernels import lightning_attention
from kernels.benchmark_providers import make_slopes, make_tensors
from kernels.benchmark_timing import time_interleaved
from kernels.launch import Warps, force
from training.command import run_command
from training.errors import SettingError


@dataclass(kw_only=True, slots=True)
class TuneConfig:
    """The shape to tune for, and the choices to cross."""

    tokens: int = 131072  # of each measurement: batch times length
    lengths: list[int] = field(default_factory=lambda: [1024, 8192, 131072])  # each divides tokens
    heads: int = 16  # of each sequence
    head_dim: int = 128  # of q, k and v
    chunks: list[int] = field(default_factory=lambda: [64])  # rows of a chunk
    walks: list[str] = field(default_factory=lambda: ["8x3", "8x4"])  # warps x stages of a walk
    dk_dvs: list[str] = field(default_factory=lambda: ["8x3", "8x2", "none"])  # none: a walk each
    splits: list[bool] = field(default_factory=lambda: [False, True])  # of the weights (docs/kernels.md)
    segments: list[int] = field(default_factory=list)  # per sequence; empty: as kernels/launch.py chooses
    rounds: int = 5  # of timing, candidates in turn; the median counts
    candidates: str | None = None  # JSON: what the script passes to its own processes

    def __post_init__(self) -> None:
        for length in self.lengths:
            if length < 1 or self.tokens % length:
                raise SettingError(f"lengths={length} must divide tokens={self.tokens}.")


def main(config: TuneConfig) -> int:
    """Time all candidates, restarting after one that kills its process."""
    if config.candidates is not None:
        for candidate in json.loads(config.candidates):
            print(json.dumps(candidate | time_candidate(config, candidate)), flush=True)
        return 0
    if not torch.cuda.is_available():
        raise SettingError("scripts.tune_kernels needs a CUDA device and there is none.")
    choices = itertools.product(
        config.lengths, config.chunks, config.walks, config.dk_dvs, config.splits, config.segments or [0]
    )
    names = ("length", "chunk", "walk", "dk_dv", "split", "segments")
    left = [dict(zip(names, choice, strict=True)) for choice in choices]
    while left:
        arguments = [*sys.argv[1:], f"candidates={json.dumps(left)}"]
        process = subprocess.run(
            [sys.executable, "-m", "scripts.tune_kernels", *arguments], stdout=subprocess.PIPE, text=True
        )
        done = [json.loads(line) for line in process.stdout.splitlines()]
        for row in done:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if len(done) < len(left):
            print(f"crashed: {left[len(done)]}", flush=True)
        left = left[len(done) + 1 :]
    return 0


def time_candidate(config: TuneConfig, candidate: dict) -> dict:
    """Median milliseconds of forward and of forward and backward; or the error's first line."""
    length, D = candidate["length"], config.head_dim
    q, k, v, grad = make_tensors((config.tokens // length, length, config.heads, D, D), "bf16", "cuda")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    slopes = make_slopes(config.heads, "cuda")
    choices = {
        "chunk": candidate["chunk"],
        "walk": _warps(candidate["walk"]),
        "dk_dv": _warps(candidate["dk_dv"]),
        "split_weights": candidate["split"],
        "gluon": False,  # hopper_lightning.py takes no such choices
    }
    if candidate["segments"]:
        choices["segments"] = candidate["segments"]

    def forward() -> None:
        with torch.no_grad():
            lightning_attention(q, k, v, slopes)

    def both() -> None:
        torch.autograd.grad(lightning_attention(q, k, v, slopes)[0], (q, k, v), grad)

    try:
        with force(**choices):
            times = time_interleaved({"forward_ms": forward, "both_ms": both}, config.rounds, "cuda")
        return {name: round(ms, 4) for name, ms in times.items()}
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            raise
        return {"error": str(error).splitlines()[0][:120] if str(error) else type(error).__name__}


def _warps(text: str) -> Warps | None:
    return None if text == "none" else Warps(*map(int, text.split("x")))


if __name__ == "__main__":
    run_command(main, TuneConfig, __doc__)
