"""Time whole training steps: speed, memory and MFU of each model, length and way to run it, in one call.

    python -m scripts.benchmark_training                                    the table, on a GPU
    python -m scripts.benchmark_training models=[tnl-1b] seq_lens=[8192] profile=true
    python -m scripts.benchmark_training models=[tnl-385m] seq_lens=[1024,16384,262144] tokens=262144 \\
        'settings=["model.activation_checkpointing=full"]'                  flatness over lengths

Every point runs in a process of its own on random tokens: forward, backward, clipping and optimizer step.
Ways to run:
    engine  DeepSpeed, as train.py does, with the setting engine=
    loop    the same model without DeepSpeed: bf16 weights and gradients, fp32 masters and moments
    fla     engine, with flash-linear-attention's kernel in place of ours, if it is installed
    plain   fla, with a loss of plain PyTorch: chunks of F.cross_entropy, computed again in backward
fla and plain keep all activations, since checkpointing doesn't compile around that kernel.
Writes table.md, results.csv, results.json and speed.png.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.loader import Batch
from models.layers import LMHead
from models.transnormer import TransNormer
from training import plots
from training.command import run_command
from training.config import compose
from training.distributed import World, process_group
from training.engine import Engine, compile_for_any_documents
from training.errors import SettingError
from training.metrics import peak_flops, peak_memory_gib
from training.optimizer import parameter_groups
from training.tables import csv_text, markdown_table
from training.train_config import TrainConfig

MODELS = ("tnl-385m", "tnl-1b", "llama-385m", "llama-1b")
WAYS = ("engine", "loop", "fla", "plain")
LOSS_CHUNK_TOKENS = 8192  # of plain's loss
COLUMNS = (
    "model",
    "way",
    "seq_len",
    "micro_batch_size",
    "status",
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "first_steps_peak_gib",
    "first_step_seconds",
    "loss",
)


@dataclass(kw_only=True, slots=True)
class TrainingBenchmarkConfig:
    """What to time, and for how long."""

    models: list[str] = field(default_factory=lambda: list(MODELS))  # model= choices
    ways: list[str] = field(default_factory=lambda: ["engine"])  # ways to run, as listed above
    seq_lens: list[int] = field(default_factory=lambda: [2048, 8192, 32768])  # each divides tokens
    tokens: int = 65536  # per step
    micro_tokens: int | None = None  # per micro-step, a whole number of sequences; null: all at once
    vocab_size: int = 64000  # of every model
    engine: str = "zero1"  # engine= choice
    warmup_steps: int = 3  # for compilation and clocks
    steps: int = 10  # timed
    settings: list[str] = field(default_factory=list)  # further settings of train.py for every point
    limit_seconds: float = 600.0  # a point that takes longer is ended, and the next one starts
    profile: bool = False  # also print each point's GPU time by kernel
    output: str = "outputs/benchmark_training"  # folder of the results
    point: str | None = None  # the JSON of one point: what the script passes to its own processes

    def __post_init__(self) -> None:
        unknown = sorted(set(self.ways) - set(WAYS))
        if unknown:
            raise SettingError(f"ways={unknown[0]} is unknown. Allowed: {', '.join(WAYS)}.")
        for key in ("steps", "warmup_steps"):
            if getattr(self, key) < 1:
                raise SettingError(f"{key}={getattr(self, key)} must be at least 1.")
        for length in self.seq_lens:
            if length < 1 or self.tokens % length:
                raise SettingError(f"seq_lens={length} must divide tokens={self.tokens}.")
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise SettingError(f"micro_tokens={self.micro_tokens} must be at least 1, or null.")


def main(config: TrainingBenchmarkConfig) -> int:
    """Run every point in its own process, or this process's one point; 1 if any failed.

    Raises:
        SettingError: settings that train.py would refuse.
    """
    if config.point is not None:
        point = json.loads(config.point)
        with process_group(timeout_minutes=5) as world:
            print(json.dumps(measure(config, point["model"], point["way"], point["seq_len"], world)))
        return 0
    for model in config.models:
        train_config(config, model, config.seq_lens[0])
    if config.models == list(MODELS) and not torch.cuda.is_available():
        raise SettingError(
            f"models={list(MODELS)} need a GPU, and there is none here: give small ones, as "
            "models=[tnl-tiny] seq_lens=[512] tokens=2048."
        )
    rows = []
    for seq_len in config.seq_lens:
        for model in config.models:
            for way in config.ways:
                point = {"model": model, "way": way, "seq_len": seq_len}
                print(f"{model}, {way}, seq_len {seq_len:,} …", file=sys.stderr, flush=True)
                rows.append(run_point(point, config.limit_seconds))
                values = [_format(rows[-1].get(column)) for column in (*COLUMNS, "error")]
                print("  ".join(filter(None, values)), flush=True)
                write_results(Path(config.output), config, rows)
    print((Path(config.output) / "table.md").read_text())
    return int(any(row["status"] in ("failed", "timeout") for row in rows))


def run_point(point: dict, limit_seconds: float) -> dict:
    """One point in a fresh process; a point that fails is recorded, and the others still run."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("output=")]
    command = [sys.executable, "-m", "scripts.benchmark_training", *arguments, f"point={json.dumps(point)}"]
    row = dict.fromkeys(COLUMNS) | point
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return row | {"status": "timeout", "error": f"not done after {limit_seconds:.0f} s"}
    *report, last = result.stdout.strip().splitlines() or [""]
    print("\n".join(report), end="\n" if report else "")
    if result.returncode == 0:
        return row | json.loads(last) | {"status": "ok"}
    lines = result.stderr.strip().splitlines() or [f"ended without a message, code {result.returncode}"]
    error = next((line for line in reversed(lines) if "rror:" in line), lines[-1])[:300]
    status = "oom" if "OutOfMemoryError" in result.stderr else "failed"
    return row | {"status": status, "error": error, "last_lines": lines[-30:]}


def train_config(config: TrainingBenchmarkConfig, model_name: str, seq_len: int) -> TrainConfig:
    """The settings of train.py that a point stands for."""
    settings = [f"model={model_name}", f"seq_len={seq_len}", f"batch_tokens={config.tokens}"]
    settings += [f"model.vocab_size={config.vocab_size}", f"engine={config.engine}", *config.settings]
    train = compose(TrainConfig, settings, "train")
    return replace(train, engine=train.engine.with_precision())


def measure(config: TrainingBenchmarkConfig, model_name: str, way: str, seq_len: int, world: World) -> dict:
    """Time one point in this process."""
    train = train_config(config, model_name, seq_len)
    if way in ("fla", "plain"):
        train.model.activation_checkpointing = "none"
        use_flash_linear_attention()
    if way == "plain":
        LMHead.forward = plain_loss  # type: ignore[method-assign, assignment]
    micro_batch_size = max(1, (config.micro_tokens or config.tokens) // seq_len)
    accumulation_steps = train.sequences_per_step // micro_batch_size
    with world.device:  # weights are drawn where they stay
        model = TransNormer(train.model)
    if way == "loop":
        step = bare_loop(model, train, world.device)
    else:
        engine = Engine(
            model, train, world, accumulation_steps=accumulation_steps, micro_batch_size=micro_batch_size
        )

        def step(batches: list[Batch]) -> float:
            return engine.train_step(batches, train.batch_tokens, 1e-4).loss

    batches = random_batches(train, micro_batch_size, accumulation_steps)
    first_seconds = [_timed(step, batches, world.device)[0] for _ in range(config.warmup_steps)]
    first_steps_peak = peak_memory_gib(world.device)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    timed = [_timed(step, batches, world.device) for _ in range(config.steps)]
    memory = peak_memory_gib(world.device)
    if config.profile:
        print_profile(step, batches)
    speed = train.batch_tokens / statistics.median(seconds for seconds, _ in timed)
    peak = peak_flops(world.device)
    return {
        "micro_batch_size": micro_batch_size,
        "parameters": train.model.num_parameters(),
        "tokens_per_second": speed,
        "mfu": speed * train.model.flops_per_token(seq_len) / peak if peak else None,
        "peak_memory_gib": memory,
        "first_steps_peak_gib": first_steps_peak,
        "first_step_seconds": first_seconds[0],
        "step_seconds": [seconds for seconds, _ in timed],
        "loss": timed[-1][1],
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


def bare_loop(model: TransNormer, train: TrainConfig, device: torch.device) -> Callable[[list[Batch]], float]:
    """The same step without DeepSpeed: bf16 weights and gradients, fp32 masters and moments, clipping."""
    if train.engine.compile != "false" and device.type == "cuda":
        for module in (*model.model.layers, model.model.final_norm):
            module.forward = compile_for_any_documents(module.forward)
    masters = {p: p.detach().clone().requires_grad_() for p in model.parameters()}
    for p in model.parameters():
        p.data = p.data.bfloat16()
    model.compute_dtype = torch.bfloat16
    groups = parameter_groups(model, train.optim)
    groups = [group | {"params": [masters[p] for p in group["params"]]} for group in groups]
    betas = (train.optim.beta1, train.optim.beta2)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=betas, eps=train.optim.eps, fused=True)

    def step(batches: list[Batch]) -> float:
        total = torch.zeros((), device=device)
        for batch in batches:
            tokens, targets, cu_seqlens = (x.to(device) for x in batch if x is not None)
            loss = model(tokens, targets, cu_seqlens=cu_seqlens)
            (loss / train.batch_tokens).backward()
            total += loss.detach()
        for p, master in masters.items():
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(list(masters.values()), train.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(list(masters), list(masters.values()))
        return float(total) / train.batch_tokens

    return step


def use_flash_linear_attention() -> None:
    """Put flash-linear-attention's kernel under our model.

    Raises:
        SettingError: it is not installed.
    """
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        raise SettingError(
            "ways=fla and plain need flash-linear-attention: see requirements-peers.txt."
        ) from None
    import models.attention

    def attention(q, k, v, slopes, initial_state, output_final_state, cu_seqlens, backend):
        return chunk_simple_gla(q, k, v, g_gamma=-slopes, scale=1.0, cu_seqlens=cu_seqlens)

    models.attention.lightning_attention = attention  # type: ignore[assignment]


def plain_loss(self: LMHead, x: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """What LMHead.forward computes in training, as it is usually written."""
    chunks = zip(x[0].split(LOSS_CHUNK_TOKENS), targets[0].split(LOSS_CHUNK_TOKENS), strict=True)
    losses = [checkpoint(_chunk_loss, *chunk, self.weight, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


@torch.compile(dynamic=False)
def _chunk_loss(x: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")


def _timed(step: Callable, batches: list[Batch], device: torch.device) -> tuple[float, float]:
    """Seconds of one step, and its loss in nats."""
    start = time.perf_counter()
    loss = step(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, loss


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


def write_results(folder: Path, config: TrainingBenchmarkConfig, rows: list[dict]) -> None:
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
    shown = [{column: row[column] for column in COLUMNS} for row in rows]
    (folder / "results.csv").write_text(csv_text(shown))
    table = markdown_table(COLUMNS, (map(_format, row.values()) for row in shown))
    (folder / "table.md").write_text(
        f"{device}, torch {facts['torch']}, {config.tokens:,} tokens a step, "
        f"vocabulary {config.vocab_size:,}\n\n{table}\n"
    )
    plot_speed(folder / "speed.png", rows)


def plot_speed(path: Path, rows: list[dict]) -> None:
    """Tokens per second over sequence length, a line for each model and way."""
    figure, (axes,) = plots.new_figure()
    done = [row for row in rows if row["status"] == "ok"]
    for model, way in dict.fromkeys((row["model"], row["way"]) for row in done):
        points = [row for row in done if (row["model"], row["way"]) == (model, way)]
        points.sort(key=lambda row: row["seq_len"])
        speeds = [row["tokens_per_second"] for row in points]
        axes.plot([row["seq_len"] for row in points], speeds, marker="o", label=f"{model}, {way}")
    plots.length_axis(axes)
    axes.set(
        ylabel="tokens per second", ylim=(0, 1.08 * max((r["tokens_per_second"] for r in done), default=1))
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if done:
        axes.legend()
    plots.save(figure, path)


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value > 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    run_command(main, TrainingBenchmarkConfig, __doc__)
