"""Time whole training steps: speed, memory and MFU of each model, length and way to run it, in one call.

    python -m scripts.benchmark_training                                    the table, on a GPU
    python -m scripts.benchmark_training models=[tnl-1b] seq_lens=[8192] profile=true

Every point runs in a process of its own on random tokens: forward, backward, clipping and optimizer step,
through the engine of train.py. Ways to run: `engine` (DeepSpeed, the setting engine=), `loop` (a bare PyTorch
loop over the same model with bf16 weights and AdamW on them), `fla` (the engine, with the attention of
flash-linear-attention in place of ours, if it is installed). Writes table.md, results.csv, results.json.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data.loader import Batch
from models.transnormer import TransNormer
from training import distributed
from training.config import TrainConfig, compose, run_command
from training.engine import Engine
from training.errors import SettingError
from training.metrics import peak_flops, peak_memory_gib
from training.optimizer import build_optimizer

WAYS = ("engine", "loop", "fla")
WARMUP_STEPS = 4
COLUMNS = (
    "model",
    "way",
    "seq_len",
    "micro_batch_size",
    "status",
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
)


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    """What to time. `settings` are further settings of train.py for every point."""

    models: list[str] = field(default_factory=lambda: ["tnl-385m", "tnl-1b", "llama-385m", "llama-1b"])
    ways: list[str] = field(default_factory=lambda: ["engine"])
    seq_lens: list[int] = field(default_factory=lambda: [2048, 8192, 32768])
    tokens: int = 65536  # per step
    vocab_size: int = 64000
    engine: str = "zero1"
    steps: int = 10  # timed, after a few for compilation and clocks
    settings: list[str] = field(default_factory=list)
    profile: bool = False  # also print each point's GPU time by kernel
    output: str = "outputs/benchmark_training"
    point: str | None = None  # the JSON of one point: what the script passes to its own processes

    def __post_init__(self) -> None:
        unknown = sorted(set(self.ways) - set(WAYS))
        if unknown:
            raise SettingError(f"ways={unknown[0]} is unknown. Allowed: {', '.join(WAYS)}.")
        if self.steps < 1:
            raise SettingError(f"steps={self.steps} must be at least 1.")
        for length in self.seq_lens:
            if length < 1 or self.tokens % length:
                raise SettingError(f"seq_lens={length} must divide tokens={self.tokens}.")


def main(config: BenchmarkConfig) -> int:
    """Run every point in its own process, or this process's one point."""
    if config.point is not None:
        point = json.loads(config.point)
        print(json.dumps(measure(config, point["model"], point["way"], point["seq_len"])))
        return 0
    rows = []
    for seq_len in config.seq_lens:
        for model in config.models:
            for way in config.ways:
                rows.append(run_point({"model": model, "way": way, "seq_len": seq_len}))
                print("  ".join(_format(rows[-1][column]) for column in COLUMNS), flush=True)
                write_results(Path(config.output), config, rows)
    print((Path(config.output) / "table.md").read_text())
    return 0


def run_point(point: dict) -> dict:
    """One point in a fresh process; a point that fails is recorded, and the others go on."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("output=")]
    command = [sys.executable, "-m", "scripts.benchmark_training", *arguments, f"point={json.dumps(point)}"]
    result = subprocess.run(command, capture_output=True, text=True)
    *report, last = result.stdout.strip().splitlines() or [""]
    print("\n".join(report), end="\n" if report else "")
    row = dict.fromkeys(COLUMNS) | point
    if result.returncode == 0:
        return row | json.loads(last) | {"status": "ok"}
    lines = result.stderr.strip().splitlines() or ["no message"]
    out_of_memory = "OutOfMemoryError" in result.stderr
    return row | {"status": "oom" if out_of_memory else "failed", "error": lines[-1][:300]}


def measure(config: BenchmarkConfig, model_name: str, way: str, seq_len: int) -> dict:
    """Time one point in this process."""
    settings = [f"model={model_name}", f"seq_len={seq_len}", f"batch_tokens={config.tokens}"]
    settings += [f"model.vocab_size={config.vocab_size}", f"engine={config.engine}", *config.settings]
    train = compose(TrainConfig, settings, "train")
    world = distributed.start(train.engine.timeout_minutes)
    micro_batch_size = (
        train.sequences_per_step if train.micro_batch_size == "auto" else train.micro_batch_size
    )
    accumulation_steps = train.sequences_per_step // micro_batch_size
    if way == "fla":
        use_flash_linear_attention()
    if way == "loop":
        step = bare_loop(train, world.device)
    else:
        model = TransNormer(train.model)
        engine = Engine(
            model, train, world, accumulation_steps=accumulation_steps, micro_batch_size=micro_batch_size
        )

        def step(batches: list[Batch]) -> None:
            engine.train_step(batches, train.batch_tokens, 1e-4)

    batches = random_batches(train, micro_batch_size, accumulation_steps)
    seconds = [_timed(step, batches, world.device) for _ in range(WARMUP_STEPS + config.steps)]
    if config.profile:
        print_profile(step, batches)
    speed = train.batch_tokens / statistics.median(seconds[WARMUP_STEPS:])
    peak = peak_flops(world.device)
    distributed.stop()
    return {
        "micro_batch_size": micro_batch_size,
        "parameters": train.model.num_parameters(),
        "tokens_per_second": speed,
        "mfu": speed * train.model.flops_per_token(seq_len) / peak if peak else None,
        "peak_memory_gib": peak_memory_gib(world.device),
        "first_step_seconds": seconds[0],
    }


def random_batches(train: TrainConfig, micro_batch_size: int, accumulation_steps: int) -> list[Batch]:
    """Micro-batches of random tokens, packed as documents of one sequence each."""
    generator = torch.Generator().manual_seed(train.seed)
    length = micro_batch_size * train.seq_len
    bounds = torch.arange(0, length + 1, train.seq_len, dtype=torch.int32)
    batches = []
    for _ in range(accumulation_steps):
        tokens = torch.randint(0, train.model.num_ids, (1, length + 1), generator=generator)
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), bounds))
    return batches


def bare_loop(train: TrainConfig, device: torch.device) -> Callable[[list[Batch]], None]:
    """The same model without DeepSpeed: bf16 weights, AdamW on them, the same clipping."""
    model = TransNormer(train.model).to(device=device, dtype=torch.bfloat16)
    if device.type == "cuda":
        for block in model.model.layers:
            block.compile(dynamic=False)
    optimizer = build_optimizer(model, replace(train.optim, lr=1e-4))

    def step(batches: list[Batch]) -> None:
        for batch in batches:
            tokens, targets, cu_seqlens = (x.to(device) for x in batch if x is not None)
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
            loss = model(tokens, targets, cu_seqlens=cu_seqlens)
            (loss / train.batch_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def use_flash_linear_attention() -> None:
    """Put flash-linear-attention's kernel under our model.

    Raises:
        SettingError: it is not installed.
    """
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        raise SettingError("ways=fla needs flash-linear-attention: see requirements-peers.txt.") from None
    import models.attention

    def attention(q, k, v, slopes, initial_state, output_final_state, cu_seqlens, backend):
        decay = -slopes.expand(*q.shape[:2], -1)
        return chunk_simple_gla(q, k, v, g=decay, scale=1.0, cu_seqlens=cu_seqlens)

    models.attention.lightning_attention = attention  # type: ignore[assignment]


def _timed(step: Callable, batches: list[Batch], device: torch.device) -> float:
    start = time.perf_counter()
    step(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def print_profile(step: Callable, batches: list[Batch]) -> None:
    """GPU time of one step by kernel, largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step(batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    on_gpu = torch.cuda.is_available()
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in profile.key_averages() if str(event.device_type).endswith("CUDA") == on_gpu]
    total = sum(getattr(event, attribute) for event in events)
    print(f"one step: {total / 1000:.1f} ms")
    for event in sorted(events, key=lambda event: -getattr(event, attribute))[:35]:
        share = getattr(event, attribute) / total
        print(
            f"{share:6.1%} {getattr(event, attribute) / 1000:9.2f} ms {event.count:6d} x  {event.key[:110]}"
        )


def write_results(folder: Path, config: BenchmarkConfig, rows: list[dict]) -> None:
    """table.md, results.csv and results.json, after every point."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts = {
        "device": device,
        "torch": torch.__version__,
        "tokens": config.tokens,
        "vocab_size": config.vocab_size,
    }
    (folder / "results.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        f"{device}, torch {facts['torch']}, {config.tokens:,} tokens a step, vocabulary {config.vocab_size:,}"
    ]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_format(row[column]) for column in COLUMNS) + " |" for row in rows]
    (folder / "table.md").write_text("\n".join(lines) + "\n")


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value > 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    run_command(main, BenchmarkConfig, __doc__)
