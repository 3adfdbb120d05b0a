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

import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import default_backend, lightning_attention, lightning_attention_step, reference
from training.config import run_command
from training.errors import SettingError

Shape = tuple[int, int, int, int, int]  # B, N, H, Dk, Dv
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WRONG = {
    "bf16": 5e-3,
    "fp16": 2e-3,
    "fp32": 1e-3,
}  # relative error that no rounding of a right result explains
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
ROUND_MS = 30  # one provider's turn: long enough to reach the clocks of sustained load


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    """What to compare and where to write; `null` lengths and tokens are chosen for the device."""

    only: str = "all"  # all, correctness, lengths, extras, passes
    extras: list[str] = field(default_factory=lambda: list(EXTRAS))  # which of them
    quick: bool = False
    output: str = "outputs/benchmark_kernels"
    lengths: list[int] | None = None  # N; the batch is tokens / N
    tokens: int | None = None
    heads: int = 16
    k_dim: int = 128
    v_dim: int = 128
    dtype: str | None = None  # bf16, fp16, fp32
    providers: list[str] | None = None  # names from the table; null: all that are installed
    quadratic_max_length: int = 32768  # softmax attention is not timed beyond
    rounds: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        parts = ("all", "correctness", "lengths", "extras", "passes")
        if self.only not in parts:
            raise SettingError(f"only={self.only}: allowed are {', '.join(parts)}.")
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


@dataclass(frozen=True)
class Provider:
    """Something that computes attention from q, k, v, slopes, and cu_seqlens where it is `general`."""

    name: str
    run: Callable[..., Tensor]
    general: bool = False  # takes any head dims, packed documents too
    heads_first: bool = False  # takes (B, H, N, D) instead of (B, N, H, D)
    softmax: bool = False  # causal softmax attention: another function, and quadratic in N
    quadratic: bool = False


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
    extra_share: float | None = field(default=None)  # of o, dq, dk and dv together


def installed_providers(device: str) -> list[Provider]:
    """Ours first, then the peers found on this machine, each in the layout it wants."""
    ours = Provider("ours", _ours, general=True)
    if device == "cpu":
        quadratic = Provider("quadratic", lambda *x: reference.quadratic(*x)[0], quadratic=True)
        recurrent = Provider("recurrent", lambda *x: reference.recurrent(*x)[0], quadratic=True)
        return [ours, quadratic, recurrent]
    providers = [ours]
    for name in ("chunk_simple_gla", "fused_chunk_simple_gla"):
        function = _import("fla.ops.simple_gla", name)
        if function is not None:
            providers.append(Provider(f"fla {name}", partial(_simple_gla, function), general=True))
    function = _import("lightning_attn.ops", "lightning_attn_func")
    if function is not None:
        run = partial(_official, function)
        providers.append(Provider("lightning_attn", run, heads_first=True))
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        run = partial(_softmax, backend)
        providers.append(Provider(f"sdpa {name}", run, heads_first=True, softmax=True, quadratic=True))
    return providers


def _import(module: str, name: str):
    """A peer's function, or None where the package is missing or does not import here."""
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a peer may fail in any way on a version it was not made for
        print(f"not compared: {module}.{name} ({in_a_line(error)})")
        return None


def in_a_line(error: Exception) -> str:
    """The kind of an error and the start of what it says."""
    return f"{type(error).__name__}: {str(error)[:80]}".splitlines()[0]


def _ours(q, k, v, slopes, cu_seqlens=None):
    return lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens)[0]


def _simple_gla(function, q, k, v, slopes, cu_seqlens=None):
    return function(q, k, v, g_gamma=-slopes, scale=1.0, cu_seqlens=cu_seqlens)[0]


def _official(function, q, k, v, slopes):
    return function(q, k, v, slopes[:, None, None])


def _softmax(backend, q, k, v, slopes):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def make_slopes(heads: int, device: str) -> Tensor:
    """2^(-8(h+1)/H), the slopes of a TransNormer layer."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device, dtype=torch.float32) / heads)


def make_tensors(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of o, (B, N, H, D)."""
    B, N, H, Dk, Dv = shape
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(B, N, H, Dk), (B, N, H, Dk), (B, N, H, Dv), (B, N, H, Dv)]
    return [torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes]


def forward_and_gradients(run, q, k, v, grad_o) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = run(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), grad_o)]


def in_layout(provider: Provider, tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous copies in the provider's layout, so that no copy is timed."""
    return [x.transpose(1, 2).contiguous() for x in tensors] if provider.heads_first else tensors


def errors_of(provider: Provider, shape: Shape, dtype: str, device: str, seed: int) -> dict[str, float]:
    """Relative errors of o, dq, dk, dv against float64, and of the final state for ours."""
    tensors = make_tensors(shape, DTYPES[dtype], device, seed)
    slopes = make_slopes(shape[2], device)
    exact = [x.double() for x in tensors]
    if provider.softmax:
        exact = [x.transpose(1, 2) for x in exact]
        truth = forward_and_gradients(partial(F.scaled_dot_product_attention, is_causal=True), *exact)
        truth = [x.transpose(1, 2) for x in truth]
    else:
        truth = forward_and_gradients(
            lambda q, k, v: lightning_attention(q, k, v, slopes, backend="torch")[0], *exact
        )
    inputs = in_layout(provider, tensors)
    results = forward_and_gradients(lambda q, k, v: provider.run(q, k, v, slopes), *inputs)
    if provider.heads_first:
        results = [x.transpose(1, 2) for x in results]
    errors = {name: _error(x, t) for name, x, t in zip(("o", "dq", "dk", "dv"), results, truth, strict=True)}
    if provider.name == "ours":
        state, exact_state = (
            lightning_attention(q, k, v, slopes, output_final_state=True, backend=backend)[1]
            for (q, k, v, _), backend in ((tensors, "auto"), (exact, "torch"))
        )
        assert state is not None
        assert exact_state is not None
        errors["state"] = _error(state, exact_state)
    return errors


def _error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def check_correctness(config: BenchmarkConfig, providers: list[Provider], device: str) -> list[dict]:
    """A table of errors, printed as it grows. What is wrong at some head dims is not timed at these.

    Every dtype of ours and shape of a general provider is checked, or what is timed where only a part was
    asked for.
    """
    H, Dk, Dv = config.heads, config.k_dim, config.v_dim
    timed_dtype = config.dtype or ("fp32" if device == "cpu" else "bf16")
    all_dtypes = config.only in ("all", "correctness") and config.dtype is None
    lengths = (512,) if device == "cpu" else (1024, 4096)
    shapes = [] if config.only == "extras" else [(2, length, H, Dk, Dv) for length in lengths]
    if device != "cpu" and config.only != "lengths":
        more = [checked for name, (_, checked) in EXTRA_SHAPES.items() if name in config.extras]
    else:
        more = []
    rows = []
    print(f"{'provider':<26}{'dtype':<7}{'B, N, H, Dk, Dv':<26}" + "".join(f"{n:>10}" for n in ERRORS))
    for provider in providers:
        for dtype in DTYPES if provider.name == "ours" and all_dtypes else [timed_dtype]:
            for shape in shapes + (more if provider.general else []):
                row = _check(config, provider, shape, dtype, device)
                rows.append(row)
                values = "".join(f"{row[n]:>10.1e}" if n in row else f"{'':>10}" for n in ERRORS)
                print(f"{provider.name:<26}{dtype:<7}{shape!s:<26}{values}  {row['verdict']}", flush=True)
    return rows


ERRORS = ("o", "dq", "dk", "dv", "state")


def _check(config: BenchmarkConfig, provider: Provider, shape: Shape, dtype: str, device: str) -> dict:
    row = {"provider": provider.name, "dtype": dtype, "shape": list(shape)}
    try:
        errors = errors_of(provider, shape, dtype, device, config.seed)
    except Exception as error:
        if provider.name == "ours":
            raise
        return row | {"verdict": f"fails: {in_a_line(error)}"}
    right = all(error <= WRONG[dtype] for error in errors.values())
    return row | errors | {"verdict": "right" if right else "wrong"}


class Clock:
    """Milliseconds per call, by CUDA events or the wall clock."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) * 1e3 / repeats
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(repeats):
            call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / repeats


def time_interleaved(calls: dict[str, Callable], clock: Clock, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; all take turns in every round, after one that is not counted."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(ROUND_MS / max(clock(call, 1), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            ms = clock(call, repeats[name])
            if i > 0:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(clock: Clock, device: str) -> float:
    """Bytes per millisecond, read and written, of a copy much larger than any cache."""
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    ms = time_interleaved({"copy": lambda: target.copy_(source)}, clock, 5)["copy"]
    return 2 * source.nbytes / ms


def extra_memory(call: Callable[[], list[Tensor]]) -> tuple[float, float]:
    """MiB that one forward + backward takes beyond its inputs and outputs, and as a share of the outputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = sum(x.nbytes for x in call())
    extra = torch.cuda.max_memory_allocated() - before - outputs
    return extra / 2**20, extra / outputs


def time_case(config, providers, case, shape, dtype, device, clock, bandwidth) -> list[Row]:
    """Forward and forward + backward of all providers on one shape (B, N, H, Dk, Dv)."""
    B, N, H, Dk, Dv = shape
    tensors = make_tensors(shape, DTYPES[dtype], device, config.seed)
    slopes = make_slopes(H, device)
    forward: dict[str, Callable] = {}
    both: dict[str, Callable] = {}
    memory = {}
    for provider in providers:
        q, k, v, grad_o = in_layout(provider, tensors)
        run = partial(_run, provider, slopes)
        forward[provider.name] = torch.no_grad()(partial(run, q, k, v))
        both[provider.name] = partial(forward_and_gradients, run, q, k, v, grad_o)
    forward_ms = time_interleaved(forward, clock, config.rounds)
    both_ms = time_interleaved(both, clock, config.rounds)
    for name, call in both.items():
        memory[name] = extra_memory(call) if device == "cuda" else (None, None)
    bytes_per_dim = B * N * H * DTYPES[dtype].itemsize
    forward_floor = bytes_per_dim * (2 * Dk + 2 * Dv) / bandwidth
    both_floor = forward_floor + bytes_per_dim * (4 * Dk + 3 * Dv) / bandwidth
    return [
        Row(
            provider=name, case=case, length=N, batch=B, heads=H, k_dim=Dk, v_dim=Dv, dtype=dtype,
            forward_ms=forward_ms[name], forward_backward_ms=both_ms[name],
            forward_of_floor=forward_floor / forward_ms[name],
            forward_backward_of_floor=both_floor / both_ms[name],
            extra_mib=memory[name][0], extra_share=memory[name][1],
        )
        for name in forward
    ]  # fmt: skip


def _run(provider, slopes, q, k, v):
    return provider.run(q, k, v, slopes)


def time_lengths(config, providers, device, clock, bandwidth) -> list[Row]:
    """The main comparison: the same number of tokens at every length."""
    cuda = device == "cuda"
    tokens = config.tokens or (131072 if cuda else 2048)
    lengths = config.lengths or _lengths(config.quick, cuda)
    dtype = config.dtype or ("bf16" if cuda else "fp32")
    rows = []
    for length in lengths:
        shape = (max(1, tokens // length), length, config.heads, config.k_dim, config.v_dim)
        timed = [p for p in providers if not p.quadratic or length <= config.quadratic_max_length]
        rows += time_case(config, timed, "lengths", shape, dtype, device, clock, bandwidth)
        print_rows(rows[-len(timed) :])
    return rows


def _lengths(quick: bool, cuda: bool) -> list[int]:
    if not cuda:
        return [512, 2048] if quick else [256, 512, 1024, 2048]
    if quick:
        return [1024, 8192, 131072]
    return [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072]


def time_extras(config, providers, wrong, device, clock, bandwidth) -> Iterator[list[Row]]:
    """Other head dims and heads, a million tokens, packed documents, and one token, of general providers.

    What is wrong there is added to `wrong`.
    """
    dtype = config.dtype or "bf16"

    def right(shape: Shape) -> list[Provider]:
        return [p for p in providers if p.general and (p.name, *shape[3:]) not in wrong]

    for name in config.extras:
        if name == "one_token":
            rows = time_one_token(config, wrong, dtype, device, clock, bandwidth)
        elif name == "packed":
            timed = [
                p
                for p in right(PACKED_SHAPE)
                if _is_right(p.name, name, wrong, dtype, partial(_packed_error, p, dtype, device))
            ]
            # all ways to cut in turns, since their ratio is what is asked
            documents = packed_providers(timed, device, packed_cases(config.seed))
            rows = time_case(config, documents, name, PACKED_SHAPE, dtype, device, clock, bandwidth)
        else:
            shape, _ = EXTRA_SHAPES[name]
            rows = time_case(config, right(shape), name, shape, dtype, device, clock, bandwidth)
        print_rows(rows)
        yield rows


def _is_right(name: str, case: str, wrong: set, dtype: str, error_of: Callable[[], float]) -> bool:
    """Whether the error of a provider is one of rounding; if not, says so and adds the case to `wrong`."""
    try:
        error = error_of()
        if error <= WRONG[dtype]:
            return True
        reason = f"wrong by {error:.1e}"
    except Exception as problem:
        if name == "ours":
            raise
        reason = in_a_line(problem)
    print(f"not timed: {name}, {case}: {reason}", flush=True)
    wrong.add((name, case))
    return False


def _packed_error(provider: Provider, dtype: str, device: str) -> float:
    """Against float64 on a few short documents."""
    heads = PACKED_SHAPE[2]
    tensors = make_tensors((1, 700, *PACKED_SHAPE[2:]), DTYPES[dtype], device)[:3]
    slopes, bounds = make_slopes(heads, device), [0, 3, 300, 700]
    (packed,) = packed_providers([provider], device, {"short": bounds})
    cu_seqlens = torch.tensor(bounds, device=device, dtype=torch.int32)
    q, k, v = (x.double() for x in tensors)
    truth = lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens, backend="torch")[0]
    return _error(packed.run(*tensors, slopes), truth)


def packed_providers(providers: list[Provider], device: str, cases: dict[str, list[int]]) -> list[Provider]:
    """Each provider over packed documents, for each way to cut them."""

    def packed(provider: Provider, name: str, bounds: list[int]) -> Provider:
        dtype = torch.int32 if provider.run is _ours else torch.int64
        cu_seqlens = torch.tensor(bounds, device=device, dtype=dtype)
        return Provider(f"{provider.name}, {name}", partial(provider.run, cu_seqlens=cu_seqlens))

    return [packed(provider, name, bounds) for name, bounds in cases.items() for provider in providers]


def packed_cases(seed: int) -> dict[str, list[int]]:
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


def print_passes(config, device, ours: Provider) -> None:
    """Median milliseconds of each kernel of a forward and backward, in the order of their first launch.

    Beside them: their sum, what a call takes, also as a CUDA graph, and what the CPU takes to issue one while
    the GPU is held. Where the last is the largest, launching limits the speed, and a graph is faster.
    """
    tokens, dtype = config.tokens or 131072, DTYPES[config.dtype or "bf16"]
    clock = Clock(device)
    cases = {
        f"N = {length:,}": (
            (max(1, tokens // length), length, config.heads, config.k_dim, config.v_dim),
            ours,
        )
        for length in config.lengths or [1024, 8192, 131072]
    }
    cases |= {name: (EXTRA_SHAPES[name][0], ours) for name in ("head_dim_64", "few_heads")}
    packed = packed_providers([ours], device, packed_cases(config.seed))
    cases |= {provider.name: (PACKED_SHAPE, provider) for provider in packed}
    for name, (shape, provider) in cases.items():
        tensors = make_tensors(shape, dtype, device, config.seed)
        run = partial(_run, provider, make_slopes(shape[2], device))
        call = partial(forward_and_gradients, run, *tensors)
        calls: dict[str, Callable] = {"call": call, "graph": _captured(call, device)}
        ms = time_interleaved(calls, clock, config.rounds)
        issue_ms = _issue_ms(call)
        times, names = _kernels_of(call)
        shown = ", ".join(f"{kernel} {time:.3f}" for kernel, time in zip(names, times, strict=True))
        print(
            f"{name}: {ms['call']:.3f} a call, {ms['graph']:.3f} as a graph, {issue_ms:.3f} to issue, "
            f"{sum(times):.3f} in kernels: {shown}",
            flush=True,
        )


def _issue_ms(call: Callable[[], object], repeats: int = 8) -> float:
    """What the CPU takes for one call, while the GPU is held and runs none of it."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(1e8))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    ms = (time.perf_counter() - start) * 1e3 / repeats
    torch.cuda.synchronize()
    return ms


def _kernels_of(call: Callable[[], object], repeats: int = 50) -> tuple[list[float], list[str]]:
    """Median milliseconds and names of a call's kernels, by their place: one of them may come twice."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    events = sorted(profile.events() or [], key=lambda event: event.time_range.start)
    kernels = [e for e in events if str(e.device_type).endswith("CUDA") and e.device_time > 1]
    per_call, left_over = divmod(len(kernels), repeats)
    if left_over:
        raise RuntimeError(
            f"{len(kernels)} kernels in {repeats} calls: they can't be told apart by their place."
        )
    times = [statistics.median(e.device_time for e in kernels[i::per_call]) / 1e3 for i in range(per_call)]
    return times, [event.name.split("<")[0][:40] for event in kernels[:per_call]]


def time_one_token(config, wrong, dtype, device, clock, bandwidth) -> list[Row]:
    """One token, ours and FLA's; the floor is the time to read and write the state."""
    calls: dict[str, Callable] = {"ours": lightning_attention_step}
    if fla := _import("fla.ops.simple_gla", "fused_recurrent_simple_gla"):
        calls["fla fused_recurrent_simple_gla"] = partial(_simple_gla_step, fla)
    rows = []
    for B in (1, 64):
        H, Dk, Dv = config.heads, config.k_dim, config.v_dim
        q, k, v, _ = (x[:, 0].contiguous() for x in make_tensors((B, 1, H, Dk, Dv), DTYPES[dtype], device))
        slopes, state = make_slopes(H, device), torch.randn(B, H, Dk, Dv, device=device)
        inputs = q, k, v, slopes, state
        one_q, one_k, one_v = (x[:, None].double() for x in (q, k, v))
        o, after = lightning_attention(one_q, one_k, one_v, slopes, state.double(), True, backend="torch")
        assert after is not None
        graphs: dict[str, Callable] = {}
        for name, call in calls.items():
            error_of = partial(_step_error, call, inputs, (o[:, 0], after))
            if _is_right(name, f"one token, B = {B}", wrong, dtype, error_of):
                graphs[name] = _captured(partial(call, *inputs), device)
        rows += [
            Row(
                provider=name, case="one_token", length=1, batch=B, heads=H, k_dim=Dk, v_dim=Dv, dtype=dtype,
                forward_ms=ms, forward_backward_ms=None, forward_of_floor=2 * state.nbytes / bandwidth / ms,
                forward_backward_of_floor=None, extra_mib=None,
            )
            for name, ms in time_interleaved(graphs, clock, config.rounds).items()
        ]  # fmt: skip
    return rows


def _step_error(call: Callable, inputs: tuple, truth: tuple[Tensor, Tensor]) -> float:
    return max(map(_error, call(*inputs), truth))


@torch.no_grad()
def _simple_gla_step(function, q, k, v, slopes, state):
    q, k, v = (x[:, None] for x in (q, k, v))
    settings = {"g_gamma": -slopes, "scale": 1.0, "initial_state": state, "output_final_state": True}
    o, after = function(q, k, v, **settings)
    return o[:, 0], after


def _captured(call: Callable, device: str) -> Callable:
    """The call as a CUDA graph, so that the device is timed and not Python."""
    call()
    if device != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


HEADER = (
    "provider",
    "case",
    "B",
    "N",
    "H",
    "Dk",
    "Dv",
    "forward ms",
    "of floor",
    "fwd + bwd ms",
    "of floor",
    "extra MiB",
)


def cells(row: Row) -> list[str]:
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


def markdown(rows: list[Row]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: list[Row], bandwidth: float, path: Path) -> None:
    """Milliseconds over N, log-log, with the floor; forward left, forward + backward right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    parts = [
        ("forward", "forward_ms", "forward_of_floor"),
        ("forward + backward", "forward_backward_ms", "forward_backward_of_floor"),
    ]
    for axes, (title, ms, share) in zip(figure.subplots(1, 2), parts, strict=True):
        for name in dict.fromkeys(row.provider for row in rows):
            line = [row for row in rows if row.provider == name]
            axes.plot([r.length for r in line], [getattr(r, ms) for r in line], marker="o", label=name)
        ours = [row for row in rows if row.provider == "ours"]
        floor = [getattr(r, ms) * getattr(r, share) for r in ours]
        axes.plot([r.length for r in ours], floor, "k--", label=f"floor at {bandwidth / 1e9:.2f} TB/s")
        axes.set(title=title, xlabel="N (tokens)", ylabel="ms", xscale="log", yscale="log")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def write_results(config, device_name, bandwidth, checks, rows: list[Row]) -> None:
    """results.json, results.csv and, where lengths were timed, lengths.png."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"device": device_name, "torch": torch.__version__, "copy_tb_per_s": bandwidth / 1e9}
    results = {"config": asdict(config), "environment": environment, "correctness": checks}
    results["timings"] = [asdict(row) for row in rows]
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    if not rows:
        return
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, asdict(rows[0]))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lengths = [row for row in rows if row.case == "lengths"]
    if lengths:
        plot(lengths, bandwidth, folder / "lengths.png")


def main(config: BenchmarkConfig) -> int:
    """Runs the parts asked for, prints the table last. Exit code 1 if ours is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.quick:
        config.rounds = min(config.rounds, 5)
    if device == "cpu" and config.only in ("extras", "passes"):
        raise SettingError(f"only={config.only} needs a GPU, and there is none: use only=lengths.")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    providers = installed_providers(device)
    if config.providers:
        providers = [p for p in providers if p.name in config.providers]
        if not providers:
            raise SettingError(f"providers={config.providers}: none of them is installed.")
    print(f"{name}, torch {torch.__version__}, backend {default_backend(device)}")
    checks = check_correctness(config, providers, device)
    wrong = {(row["provider"], *row["shape"][3:]) for row in checks if row["verdict"] != "right"}
    clock = Clock(device)
    bandwidth = copy_bandwidth(clock, device)
    rows: list[Row] = []
    if config.only in ("all", "lengths"):
        timed = [p for p in providers if (p.name, config.k_dim, config.v_dim) not in wrong]
        rows += time_lengths(config, timed, device, clock, bandwidth)
    write_results(config, name, bandwidth, checks, rows)
    ours = next((p for p in providers if p.name == "ours"), None)
    if config.only in ("all", "extras") and device == "cuda":
        for extra in time_extras(config, providers, wrong, device, clock, bandwidth):
            rows += extra
            write_results(config, name, bandwidth, checks, rows)  # already now: the rest takes minutes
    if config.only in ("all", "passes") and device == "cuda" and ours:
        print_passes(config, device, ours)
    left_out = ", ".join(" ".join(map(str, case)) for case in sorted(wrong, key=str)) or "nothing"
    print(f"\n{name}, copy {bandwidth / 1e9:.2f} TB/s; not timed because wrong or failing: {left_out}")
    print(f"results in {config.output}\n\n{markdown(rows)}" if rows else f"results in {config.output}")
    return 1 if any(name == "ours" for name, *_ in wrong) else 0


if __name__ == "__main__":
    run_command(main, BenchmarkConfig, __doc__)
