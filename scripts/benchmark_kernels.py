"""Time the attention kernels beside every installed peer, in one run on the same inputs.

    python -m scripts.benchmark_kernels                      everything, about ten minutes on a GPU
    python -m scripts.benchmark_kernels quick=true           fewer lengths and rounds, about three minutes
    python -m scripts.benchmark_kernels only=correctness     errors against float64 and nothing else
    python -m scripts.benchmark_kernels only=extras          other head dims, packed documents, one token;
                                                             extras=[packed] for one of them
    python -m scripts.benchmark_kernels only=passes          each of our kernels by itself, and their launch

Correctness comes first, and a provider whose output is wrong is not timed. Inputs are random. Providers take
turns under sustained load, and figures are medians over rounds. The floor is the time that reading the inputs
and writing the outputs once would take at the bandwidth of a copy, measured in the same run. Peers are
optional: pip install -r requirements-peers.txt. Without a GPU the PyTorch backend is timed against the
references.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch

from kernels import default_backend
from kernels.benchmark_providers import (
    DTYPES,
    Check,
    Provider,
    Shape,
    batch_errors,
    forward_and_gradients,
    installed_providers,
    installed_steps,
    make_slopes,
    make_step_inputs,
    make_tensors,
    packed_errors,
    packed_providers,
    step_errors,
)
from kernels.benchmark_timing import (
    captured,
    copy_bandwidth,
    extra_memory,
    issue_ms,
    kernel_times,
    time_interleaved,
)
from training import plots
from training.command import run_command
from training.errors import SettingError
from training.tables import csv_text, markdown_table

PARTS = ("all", "correctness", "lengths", "extras", "passes")
# What is timed and what is checked: the same heads and head dims, for which a peer tunes itself for a minute.
EXTRA_SHAPES: dict[str, tuple[Shape, Shape]] = {
    "head_dim_64": ((16, 8192, 16, 64, 64), (2, 777, 16, 64, 64)),
    "head_dim_256": ((16, 8192, 8, 256, 256), (1, 700, 8, 256, 256)),
    "wide_keys": ((16, 8192, 16, 256, 128), (1, 1500, 16, 256, 128)),
    "few_heads": ((1, 131072, 8, 128, 128), (1, 8191, 8, 128, 128)),
    "million_tokens": ((1, 2**20, 16, 128, 128), (3, 1000, 16, 128, 128)),
}
EXTRAS = (*EXTRA_SHAPES, "packed", "one_token")
PACKED_SHAPE: Shape = (1, 131072, 16, 128, 128)
PACKED_CHECK_TOKENS = 700
STEP_BATCHES = (1, 64)
RESULTS = ("o", "dq", "dk", "dv", "state")
HEADER = (
    "provider", "case", "B", "N", "H", "Dk", "Dv",
    "forward ms", "of floor", "fwd + bwd ms", "of floor", "extra MiB",
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class KernelBenchmarkConfig:
    """What to compare, and where to write."""

    only: str = "all"  # all, correctness, lengths, extras, passes
    extras: list[str] = field(default_factory=lambda: list(EXTRAS))  # which extra cases to check and time
    quick: bool = False  # fewer lengths and rounds
    output: str = "outputs/benchmark_kernels"  # folder of the results
    lengths: list[int] | None = None  # N; the batch is tokens / N; null: chosen for the device
    tokens: int | None = None  # of all sequences together; null: chosen for the device
    heads: int = 16  # H
    k_dim: int = 128  # Dk, features per head of q and k
    v_dim: int = 128  # Dv, features per head of v
    dtype: str | None = None  # bf16, fp16, fp32; null: bf16 on a GPU, fp32 on a CPU
    providers: list[str] | None = None  # names from the table; null: all that are installed
    quadratic_max_length: int = 32768  # softmax attention is not timed beyond
    rounds: int = 10  # turns of each provider, of which figures are medians
    seed: int = 0  # of the random inputs

    def __post_init__(self) -> None:
        if self.only not in PARTS:
            raise SettingError(f"only={self.only}: allowed are {', '.join(PARTS)}.")
        if self.only == "passes":
            if self.providers not in (None, ["ours"]):
                raise SettingError("only=passes times ours alone: leave providers out, or [ours].")
            self.providers = ["ours"]
        if self.dtype is not None and self.dtype not in DTYPES:
            raise SettingError(f"dtype={self.dtype}: allowed are {', '.join(DTYPES)}.")
        unknown = sorted(set(self.extras) - set(EXTRAS))
        if unknown:
            raise SettingError(f"extras: {unknown[0]} is unknown. Allowed: {', '.join(EXTRAS)}.")
        if self.rounds < 1 or self.heads < 1:
            raise SettingError(f"rounds={self.rounds} heads={self.heads}: both must be 1 or more.")
        for length in self.lengths or []:
            if length < 1 or (self.tokens or length) % length:
                raise SettingError(f"lengths={self.lengths}: each must divide tokens={self.tokens}.")
        if self.quick:
            self.rounds = min(self.rounds, 5)

    def timed_dtype(self, device: str) -> str:
        return self.dtype or ("bf16" if device == "cuda" else "fp32")

    def shape(self, batch: int, length: int) -> Shape:
        return (batch, length, self.heads, self.k_dim, self.v_dim)


@dataclass(frozen=True)
class Bench:
    """What every timing needs to know."""

    config: KernelBenchmarkConfig
    device: str  # cuda or cpu
    bandwidth: float  # of a copy, bytes/ms
    wrong: frozenset[tuple]  # (provider, case, Dk, Dv) of what is not timed

    @property
    def dtype(self) -> str:
        return self.config.timed_dtype(self.device)

    def is_right(self, provider: str, case: str, shape: Shape) -> bool:
        return (provider, case, *shape[3:]) not in self.wrong


@dataclass(kw_only=True)
class Row:
    """One line of the results."""

    provider: str
    case: str
    length: int
    batch: int
    heads: int
    k_dim: int
    v_dim: int
    dtype: str
    forward_ms: float
    forward_backward_ms: float | None
    forward_of_floor: float
    forward_backward_of_floor: float | None
    extra_mib: float | None
    extra_share: float | None = None  # of o, dq, dk and dv together


def planned_checks(
    config: KernelBenchmarkConfig, providers: list[Provider], extras: list[str], device: str
) -> Iterator[Check]:
    """In the dtype that is timed, and for ours in every dtype unless one part or dtype was asked for."""
    timed_dtype = config.timed_dtype(device)
    all_dtypes = config.only in ("all", "correctness") and config.dtype is None
    lengths = (512,) if device == "cpu" else (1024, 4096)
    shapes = [] if config.only == "extras" else [config.shape(2, length) for length in lengths]
    extra_shapes = [EXTRA_SHAPES[name][1] for name in extras if name in EXTRA_SHAPES]
    for provider in providers:
        for dtype in DTYPES if provider.name == "ours" and all_dtypes else (timed_dtype,):
            for shape in shapes + extra_shapes if provider.general else shapes:
                errors = partial(batch_errors, provider, shape, dtype, device, config.seed)
                yield Check(provider.name, "batch", dtype, shape, errors)
    if "packed" in extras:
        shape = (1, PACKED_CHECK_TOKENS, *PACKED_SHAPE[2:])
        for provider in (p for p in providers if p.general):
            errors = partial(packed_errors, provider, shape, timed_dtype, device)
            yield Check(provider.name, "packed", timed_dtype, shape, errors)
    if "one_token" in extras:
        for batch, (name, step) in product(STEP_BATCHES, installed_steps().items()):
            shape = config.shape(batch, 1)
            errors = partial(step_errors, step, shape, timed_dtype, device)
            yield Check(name, "one_token", timed_dtype, shape, errors)


def check_correctness(checks: Iterable[Check]) -> list[dict]:
    """Errors and verdicts, printed as they come."""
    line = "{:<32}{:<11}{:<7}{:<26}" + "{:>10}" * len(RESULTS) + "  {}"
    print(line.format("provider", "case", "dtype", "B, N, H, Dk, Dv", *RESULTS, "verdict"))
    rows = []
    for check in checks:
        row = check.run()
        rows.append(row)
        errors = [f"{row[name]:.1e}" if name in row else "" for name in RESULTS]
        shown = check.provider, check.case, check.dtype, str(check.shape), *errors, row["verdict"]
        print(line.format(*shown), flush=True)
    return rows


def time_case(bench: Bench, providers: list[Provider], case: str, shape: Shape) -> list[Row]:
    """Forward and forward + backward of all providers on one shape."""
    B, N, H, Dk, Dv = shape
    tensors = make_tensors(shape, bench.dtype, bench.device, bench.config.seed)
    slopes = make_slopes(H, bench.device)
    forward: dict[str, Callable] = {}
    both: dict[str, Callable] = {}
    for provider in providers:
        q, k, v, grad_o = provider.in_layout(tensors)
        attention = provider.attention(slopes)
        forward[provider.name] = torch.no_grad()(partial(attention, q, k, v))
        both[provider.name] = partial(forward_and_gradients, attention, q, k, v, grad_o)
    forward_ms = time_interleaved(forward, bench.config.rounds, bench.device)
    both_ms = time_interleaved(both, bench.config.rounds, bench.device)
    bytes_per_dim = B * N * H * DTYPES[bench.dtype].itemsize
    forward_floor = bytes_per_dim * (2 * Dk + 2 * Dv) / bench.bandwidth
    both_floor = forward_floor + bytes_per_dim * (4 * Dk + 3 * Dv) / bench.bandwidth
    rows = []
    for name, call in both.items():
        extra_mib, extra_share = extra_memory(call) if bench.device == "cuda" else (None, None)
        rows.append(
            Row(
                provider=name, case=case, length=N, batch=B, heads=H, k_dim=Dk, v_dim=Dv, dtype=bench.dtype,
                forward_ms=forward_ms[name], forward_backward_ms=both_ms[name],
                forward_of_floor=forward_floor / forward_ms[name],
                forward_backward_of_floor=both_floor / both_ms[name],
                extra_mib=extra_mib, extra_share=extra_share,
            )
        )  # fmt: skip
    return rows


def time_lengths(bench: Bench, providers: list[Provider]) -> list[Row]:
    """The main comparison: the same number of tokens at every length."""
    config = bench.config
    tokens = config.tokens or (131072 if bench.device == "cuda" else 2048)
    rows = []
    for length in config.lengths or _lengths(config.quick, bench.device):
        shape = config.shape(max(1, tokens // length), length)
        timed = [
            provider
            for provider in providers
            if bench.is_right(provider.name, "batch", shape)
            and (not provider.quadratic or length <= config.quadratic_max_length)
        ]
        timed_rows = time_case(bench, timed, "lengths", shape)
        print_rows(timed_rows)
        rows += timed_rows
    return rows


def _lengths(quick: bool, device: str) -> list[int]:
    if device != "cuda":
        return [512, 2048] if quick else [256, 512, 1024, 2048]
    if quick:
        return [1024, 8192, 131072]
    return [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]


def time_extras(bench: Bench, providers: list[Provider]) -> Iterator[list[Row]]:
    """Other head dims and heads, a million tokens, packed documents, and one token, of general providers."""
    for name in bench.config.extras:
        if name == "one_token":
            yield time_one_token(bench)
            continue
        shape = PACKED_SHAPE if name == "packed" else EXTRA_SHAPES[name][0]
        timed = [p for p in providers if p.general and bench.is_right(p.name, "batch", shape)]
        if name == "packed":  # all ways to cut in turns, since their ratio is what is asked
            timed = [p for p in timed if bench.is_right(p.name, name, shape)]
            timed = packed_providers(timed, packed_cuts(bench.config.seed), bench.device)
        yield time_case(bench, timed, name, shape)


def packed_cuts(seed: int) -> dict[str, list[int]]:
    """Ways to cut PACKED_SHAPE's tokens into documents: name to where each begins, and the end."""
    num_tokens = PACKED_SHAPE[1]
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(num_tokens + 1, (999,), generator=generator).sort().values.tolist()
    return {
        "1,024 documents of 128": list(range(0, num_tokens + 1, 128)),
        "1,000 documents": [0, *inner, num_tokens],
        "16 documents of 8,192": list(range(0, num_tokens + 1, 8192)),
        "one long, 100 short": [0, *range(num_tokens - 30_000, num_tokens + 1, 300)],
    }


def time_one_token(bench: Bench) -> list[Row]:
    """One token of each sequence, ours and FLA's; the floor is the time to read and write the state."""
    rows = []
    for shape in (bench.config.shape(batch, 1) for batch in STEP_BATCHES):
        B, N, H, Dk, Dv = shape
        inputs = make_step_inputs(shape, bench.dtype, bench.device)
        floor = 2 * inputs[-1].nbytes / bench.bandwidth
        calls = {
            name: captured(partial(step, *inputs), bench.device)
            for name, step in installed_steps().items()
            if bench.is_right(name, "one_token", shape)
        }
        rows += [
            Row(
                provider=name, case="one_token", length=N, batch=B, heads=H, k_dim=Dk, v_dim=Dv,
                dtype=bench.dtype, forward_ms=ms, forward_backward_ms=None, forward_of_floor=floor / ms,
                forward_backward_of_floor=None, extra_mib=None,
            )
            for name, ms in time_interleaved(calls, bench.config.rounds, bench.device).items()
        ]  # fmt: skip
    return rows


def print_passes(bench: Bench, ours: Provider) -> None:
    """Median milliseconds of each kernel of a forward and backward, in launch order.

    Beside them: their sum, what a call takes, also as a CUDA graph, and what the CPU takes to issue one while
    the GPU is held. Where the last is the largest, launching limits the speed, and a graph is faster.
    """
    config = bench.config
    tokens = config.tokens or 131072
    cases = {
        f"N = {length:,}": (config.shape(max(1, tokens // length), length), ours)
        for length in config.lengths or _lengths(quick=True, device=bench.device)
    }
    cases |= {name: (EXTRA_SHAPES[name][0], ours) for name in ("head_dim_64", "few_heads")}
    packed = packed_providers([ours], packed_cuts(config.seed), bench.device)
    cases |= {provider.name: (PACKED_SHAPE, provider) for provider in packed}
    for name, (shape, provider) in cases.items():
        tensors = make_tensors(shape, bench.dtype, bench.device, config.seed)
        attention = provider.attention(make_slopes(shape[2], bench.device))
        call = partial(forward_and_gradients, attention, *tensors)
        calls: dict[str, Callable] = {"call": call, "graph": captured(call, bench.device)}
        ms = time_interleaved(calls, config.rounds, bench.device)
        issue = issue_ms(call)
        kernels = kernel_times(call)
        print(
            f"{name}: {ms['call']:.3f} a call, {ms['graph']:.3f} as a graph, {issue:.3f} to issue, "
            f"{sum(time for _, time in kernels):.3f} in kernels: "
            + ", ".join(f"{kernel} {time:.3f}" for kernel, time in kernels),
            flush=True,
        )


def cells(row: Row) -> list[str]:
    """A row's texts under HEADER."""

    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        row.provider, row.case, *(str(x) for x in (row.batch, row.length, row.heads, row.k_dim, row.v_dim)),
        show(row.forward_ms, ".3f"), show(row.forward_of_floor, ".0%"), show(row.forward_backward_ms, ".3f"),
        show(row.forward_backward_of_floor, ".0%"), show(row.extra_mib, ",.0f"),
    ]  # fmt: skip


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        print(" | ".join(cells(row)), flush=True)


def plot(rows: list[Row], bandwidth: float, path: Path) -> None:
    """Milliseconds over N, log-log, with the floor; forward left, forward + backward right."""
    figure, panels = plots.new_figure(num_columns=2)
    parts = [
        ("forward", "forward_ms", "forward_of_floor"),
        ("forward + backward", "forward_backward_ms", "forward_backward_of_floor"),
    ]
    for axes, (title, ms, share) in zip(panels, parts, strict=True):
        for name in dict.fromkeys(row.provider for row in rows):
            line = [row for row in rows if row.provider == name]
            axes.plot([r.length for r in line], [getattr(r, ms) for r in line], marker="o", label=name)
        ours = [row for row in rows if row.provider == "ours"]
        floor = [getattr(r, ms) * getattr(r, share) for r in ours]
        axes.plot([r.length for r in ours], floor, "k--", label=f"floor at {bandwidth / 1e9:.2f} TB/s")
        axes.set(title=title, ylabel="ms", yscale="log")
        plots.length_axis(axes)
        plots.plain_ticks(axes.yaxis)
        axes.legend(fontsize="small")
    plots.save(figure, path)


def write_results(bench: Bench, checks: list[dict], rows: list[Row]) -> None:
    """results.json, results.csv and, where lengths were timed, lengths.png."""
    folder = Path(bench.config.output)
    folder.mkdir(parents=True, exist_ok=True)
    timings = [asdict(row) for row in rows]
    results = {
        "config": asdict(bench.config),
        "environment": {
            "device": device_name(bench.device),
            "torch": torch.__version__,
            "copy_tb_per_s": bench.bandwidth / 1e9,
        },
        "correctness": checks,
        "timings": timings,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    if timings:
        (folder / "results.csv").write_text(csv_text(timings))
    if lengths := [row for row in rows if row.case == "lengths"]:
        plot(lengths, bench.bandwidth, folder / "lengths.png")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def main(config: KernelBenchmarkConfig) -> int:
    """Runs the parts asked for, prints the table last. Exit code 1 if ours is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and config.only in ("extras", "passes"):
        raise SettingError(f"only={config.only} needs a GPU, and there is none: use only=lengths.")
    providers = installed_providers(device)
    if config.providers:
        names = [provider.name for provider in providers]
        if missing := [name for name in config.providers if name not in names]:
            raise SettingError(f"providers: {missing[0]!r} is not installed. Here are {', '.join(names)}.")
        providers = [p for p in providers if p.name in config.providers]
    print(f"{device_name(device)}, torch {torch.__version__}, backend {default_backend(device)}")
    extras = config.extras if device == "cuda" and config.only not in ("lengths", "passes") else []
    checks = check_correctness(planned_checks(config, providers, extras, device))
    wrong = frozenset(
        (check["provider"], check["case"], *check["shape"][3:])
        for check in checks
        if check["verdict"] != "right"
    )
    bench = Bench(config, device, copy_bandwidth(device), wrong)
    rows = time_lengths(bench, providers) if config.only in ("all", "lengths") else []
    write_results(bench, checks, rows)
    if config.only in ("all", "extras") and device == "cuda":
        for extra in time_extras(bench, providers):
            print_rows(extra)
            rows += extra
            write_results(bench, checks, rows)  # before the rest, which takes minutes
    ours = next((p for p in providers if p.name == "ours"), None)
    if config.only in ("all", "passes") and device == "cuda" and ours:
        print_passes(bench, ours)
    left_out = ", ".join(" ".join(map(str, case)) for case in sorted(wrong)) or "nothing"
    print(
        f"\n{device_name(device)}, copy {bench.bandwidth / 1e9:.2f} TB/s; "
        f"not timed because wrong or failing: {left_out}"
    )
    print(f"results in {config.output}")
    if rows:
        print(f"\n{markdown_table(HEADER, map(cells, rows))}")
    return 1 if any(name == "ours" for name, *_ in wrong) else 0


if __name__ == "__main__":
    run_command(main, KernelBenchmarkConfig, __doc__)
