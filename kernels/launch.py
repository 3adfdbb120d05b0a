"""How Triton launches are cut up: block sizes per architecture and shape, and segments per sequence.

The table is fixed, not tuned at run time: start-up stays short and every process computes the same bits.
No Triton in here, so that output shapes are known under torch.compile and on machines without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

SEGMENT_TOKENS = 1024  # in a shorter segment, reading and writing its state weighs more than its rows
INTERPRETER_SEGMENTS = 1  # the interpreter runs one program after another

_forced: dict[str, int] = {}  # "segments" and "chunk", set by tests through force()


@dataclass(frozen=True)
class Launch:
    chunk: int  # rows of the quadratic product
    value_block: int  # columns of the state that one program holds; the key dim is never split
    num_warps: int
    num_stages: int


# (fp32 inputs, largest padded head dim) -> launch; the figures behind each are in docs/kernels.md
_HOPPER = {
    (False, 64): Launch(chunk=64, value_block=64, num_warps=4, num_stages=3),
    (False, 128): Launch(chunk=64, value_block=128, num_warps=8, num_stages=3),
    (False, 256): Launch(chunk=64, value_block=64, num_warps=8, num_stages=2),
    (True, 64): Launch(chunk=16, value_block=32, num_warps=4, num_stages=2),
    (True, 128): Launch(chunk=16, value_block=32, num_warps=8, num_stages=2),
    (True, 256): Launch(chunk=16, value_block=32, num_warps=8, num_stages=2),
}


def padded(dim: int) -> int:
    """The power of two, 16 or more, that a head dim takes in a tile."""
    return max(16, 1 << (dim - 1).bit_length())


def choose_launch(dtype: torch.dtype, head_dim: int, device: torch.device) -> Launch:
    """The launch for the largest of both head dims."""
    launch = _HOPPER[dtype == torch.float32, max(64, padded(head_dim))]
    return replace(launch, chunk=_forced.get("chunk", launch.chunk))


def num_segments(num_sequences: int, num_tokens: int, num_heads: int, device: torch.device) -> int:
    """Segments that each sequence is cut into, so that every multiprocessor has a program.

    Arithmetic only, with no branch on a size, so that it also holds for symbolic sizes.
    """
    if "segments" in _forced:
        return _forced["segments"]
    if device.type != "cuda":
        return INTERPRETER_SEGMENTS
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = multiprocessors // (num_sequences * num_heads)
    longest = num_tokens // (num_sequences * SEGMENT_TOKENS)
    return torch.sym_max(1, torch.sym_min(wanted, longest))


@contextmanager
def force(**sizes: int) -> Iterator[None]:
    """For tests: `segments` cuts every sequence into so many, `chunk` sets the rows of a chunk."""
    _forced.update(sizes)
    try:
        yield
    finally:
        _forced.clear()
