"""What the kernels' benchmark measures with: milliseconds, bandwidth, memory, and the kernels of a call.

A call takes no arguments. `device` is "cuda", timed by CUDA events, or "cpu", timed by the wall clock.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

TURN_MS = 30  # one call's turn in a round: long enough to reach the clocks of sustained load


def milliseconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Mean milliseconds of a call over `repeats` in a row."""
    if device != "cuda":
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


def time_interleaved(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of each call; all take turns in every round, after one that is not counted."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(TURN_MS / max(milliseconds(call, 1, device), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            ms = milliseconds(call, repeats[name], device)
            if i > 0:
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: str) -> float:
    """Bytes per millisecond, read and written, of a copy much larger than any cache."""
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    ms = time_interleaved({"copy": lambda: target.copy_(source)}, rounds=5, device=device)["copy"]
    return 2 * source.nbytes / ms


def extra_memory(call: Callable[[], list[Tensor]]) -> tuple[float, float]:
    """MiB that a call takes on the GPU beyond its inputs and outputs, and as a share of the outputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = sum(x.nbytes for x in call())
    extra = torch.cuda.max_memory_allocated() - before - outputs
    return extra / 2**20, extra / outputs


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call as a CUDA graph, so that the device is timed and not Python."""
    call()
    if device != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def issue_ms(call: Callable[[], object], repeats: int = 8) -> float:
    """Milliseconds that the CPU takes to issue a call, while the GPU is held and runs none of it."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(1e8))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    ms = (time.perf_counter() - start) * 1e3 / repeats
    torch.cuda.synchronize()
    return ms


def kernel_times(call: Callable[[], object], repeats: int = 50) -> list[tuple[str, float]]:
    """Names and median milliseconds of a call's kernels in their order: one of them may come twice."""
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
    names = [event.name.split("<")[0][:40] for event in kernels[:per_call]]
    times = [statistics.median(e.device_time for e in kernels[i::per_call]) / 1e3 for i in range(per_call)]
    return list(zip(names, times, strict=True))
