"""How Triton launches are cut up: block sizes per architecture and shape, and segments per sequence.

The table is fixed, not tuned at run time: start-up stays short and every process computes the same bits.
No Triton in here, so that output shapes are known under torch.compile and on machines without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

STATE_BLOCK = 64
SEGMENT_TOKENS = 1024  # in a shorter segment, reading and writing its state weighs more than its rows
PART_TOKENS = 4096  # of a segment whose state is computed in parts, side by side
MAX_PARTS = 4


@dataclass(frozen=True)
class Warps:
    """What the compiler needs besides block sizes."""

    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """Block sizes of the kernels for one architecture and shape."""

    chunk: int  # rows of the quadratic product
    value_block: int  # columns of the state that one program holds; the key dim is never split
    walk: Warps
    dk_dv: Warps | None = None  # None: dk and dv in a walk each, where one state and both outputs don't fit
    states: Warps | None = None  # of segment states, STATE_BLOCK value columns a program; None: as the walk
    split_weights: bool = False  # in bf16: add rows to the state twice, which rounds less: see add_rows
    gluon: bool = False  # the walks of hopper_lightning.py, where they support the shape


# Largest padded head dim -> launch, for 16-bit inputs. Registers and spills of each are in docs/kernels.md.
_AMPERE = {
    64: Launch(chunk=32, value_block=64, walk=Warps(4, 3)),
    128: Launch(chunk=32, value_block=64, walk=Warps(8, 3)),
    256: Launch(chunk=32, value_block=64, walk=Warps(8, 2)),
}
_ADA = {  # 99 KB of shared memory
    64: Launch(chunk=32, value_block=64, walk=Warps(4, 3)),
    128: Launch(chunk=32, value_block=64, walk=Warps(8, 3)),
    256: Launch(chunk=32, value_block=32, walk=Warps(8, 2)),
}
_HOPPER = {
    64: Launch(chunk=64, value_block=64, walk=Warps(4, 3), dk_dv=Warps(4, 3), split_weights=True),
    128: Launch(
        chunk=64,
        value_block=128,
        walk=Warps(8, 3),
        dk_dv=Warps(8, 3),
        states=Warps(4, 3),
        split_weights=True,
        gluon=True,
    ),
    256: Launch(chunk=32, value_block=128, walk=Warps(8, 3), split_weights=True),
}
_BLACKWELL = {
    64: Launch(chunk=64, value_block=64, walk=Warps(4, 3), dk_dv=Warps(4, 3)),
    128: Launch(chunk=64, value_block=128, walk=Warps(8, 3)),
    256: Launch(chunk=64, value_block=64, walk=Warps(8, 2)),
}
_FP32 = {  # exact products run outside the matrix units, on every architecture
    64: Launch(chunk=16, value_block=32, walk=Warps(4, 2)),
    128: Launch(chunk=16, value_block=32, walk=Warps(8, 2)),
    256: Launch(chunk=16, value_block=32, walk=Warps(8, 2)),
}
_TABLES = {(8, 0): _AMPERE, (9, 0): _HOPPER, (10, 0): _BLACKWELL, (10, 3): _BLACKWELL}

_forced: dict[str, Any] = {}  # set by tests and tuning through force()


def padded(dim: int) -> int:
    """The power of two, 16 or more, that a head dim takes in a tile."""
    return max(16, 1 << (dim - 1).bit_length())


def choose_launch(dtype: torch.dtype, head_dim: int, device: torch.device) -> Launch:
    """The launch for the larger head dim; an architecture that is not listed gets the smallest tiles."""
    table = _ADA
    if dtype == torch.float32:
        table = _FP32
    elif device.type == "cuda":
        table = _TABLES.get(torch.cuda.get_device_capability(device), _ADA)
    changes: dict[str, Any] = {} if dtype == torch.bfloat16 else {"split_weights": False}
    changes |= {name: value for name, value in _forced.items() if name not in ("segments", "parts")}
    return replace(table[max(64, padded(head_dim))], **changes)


def num_segments(
    num_sequences: int, num_tokens: int, num_heads: int, head_dim: int, device: torch.device
) -> int:
    """Segments that each sequence is cut into, so that every multiprocessor is busy.

    head_dim is the larger one. Arithmetic only, no branch on a size, so that it holds for symbolic ones.
    """
    if "segments" in _forced:
        return _forced["segments"]
    if device.type != "cuda":
        return 1  # the interpreter runs one program after another
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = multiprocessors * torch.sym_max(1, torch.sym_min(2, 128 // head_dim))  # at a time
    wanted = programs // (num_sequences * num_heads)
    longest = num_tokens // (num_sequences * SEGMENT_TOKENS)
    return torch.sym_max(1, torch.sym_min(wanted, longest))


def num_parts(total_segments: int, num_tokens: int) -> int:
    """Parts in which a segment's addition to the state is computed; segments and tokens of all sequences."""
    wanted = _forced.get("parts", num_tokens // (total_segments * PART_TOKENS))
    return max(1, min(MAX_PARTS, wanted))


@contextmanager
def force(**choices: Any) -> Iterator[None]:
    """For tests and tuning: sets `segments` per sequence, `parts` per segment, or fields of Launch."""
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
