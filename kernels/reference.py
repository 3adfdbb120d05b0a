"""Three plain forms of decayed linear attention, to read and to test against.

Each computes `S_t = λ S_{t-1} + k_tᵀ v_t` and `o_t = q_t S_t` with `λ = exp(-slope)` per head: `quadratic` as
one masked product, `chunked` block by block, `recurrent` token by token, which is the definition. All are
differentiable by autograd, take any floating dtype, and compute in fp32 (fp64 for fp64 inputs).

Shapes: q, k (B, N, H, Dk); v, o (B, N, H, Dv); slopes (H,); state (B, H, Dk, Dv).
B batch, N sequence, H heads, Dk and Dv head dims.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products and states are held in: fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(form: Callable) -> Callable:
    """`form`, whose first argument is a tensor, computing in the dtypes it says also under torch.autocast."""

    @functools.wraps(form)
    def run(q, *arguments, **settings):
        if q.device.type == "meta":  # has no autocast
            return form(q, *arguments, **settings)
        with torch.autocast(q.device.type, enabled=False):
            return form(q, *arguments, **settings)

    return run


def decay_powers(slopes: Tensor, distance: Tensor) -> Tensor:
    """λ^distance per head, 0 where distance is negative (the future). Shape (H, *distance.shape)."""
    slopes = slopes.reshape(-1, *[1] * distance.dim())
    return torch.exp(-slopes * distance.clamp(min=0)) * (distance >= 0)


def _prepare(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None):
    """Everything head-first, (B, H, N, D), in the compute dtype, with a zero state where none is given."""
    dtype = compute_dtype(q.dtype)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    if initial_state is None:
        initial_state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    return q, k, v, slopes.to(dtype), initial_state.to(dtype)


@without_autocast
def quadratic(q, k, v, slopes, initial_state=None) -> tuple[Tensor, Tensor]:
    """[(Q Kᵀ) ⊙ M] V with the whole N × N matrix. Returns o and the final state."""
    out_dtype = q.dtype
    q, k, v, slopes, state = _prepare(q, k, v, slopes, initial_state)
    position = torch.arange(q.shape[2], device=q.device)
    mask = decay_powers(slopes, position[:, None] - position)  # (H, N, N)
    o = (q @ k.mT * mask) @ v
    o = o + decay_powers(slopes, position + 1)[..., None] * (q @ state)
    to_end = decay_powers(slopes, position.flip(0))[..., None]  # (H, N, 1)
    length = position.new_tensor([[q.shape[2]]])
    state = decay_powers(slopes, length) * state + (k * to_end).mT @ v
    return o.transpose(1, 2).to(out_dtype), state


def chunked(q, k, v, slopes, initial_state=None, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The quadratic form inside each chunk, a running state between chunks. Returns o and the final state."""
    outputs = []
    state = initial_state
    for start in range(0, q.shape[1], chunk):
        rows = slice(start, start + chunk)
        o, state = quadratic(q[:, rows], k[:, rows], v[:, rows], slopes, state)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


@without_autocast
def recurrent(q, k, v, slopes, initial_state=None) -> tuple[Tensor, Tensor]:
    """The definition, one token after another. Returns o and the final state."""
    out_dtype = q.dtype
    q, k, v, slopes, state = _prepare(q, k, v, slopes, initial_state)
    decay = torch.exp(-slopes)[:, None, None]
    outputs = []
    for t in range(q.shape[2]):
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None, :] @ state).squeeze(2))
    return torch.stack(outputs, dim=1).to(out_dtype), state


def per_sequence(form: Callable, q, k, v, slopes, initial_state, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Runs one of the forms above on each packed sequence: rows cu_seqlens[i] to cu_seqlens[i + 1], B = 1."""
    bounds = cu_seqlens.tolist()
    shape = (len(bounds) - 1, q.shape[2], q.shape[3], v.shape[3])
    states = q.new_zeros(shape, dtype=compute_dtype(q.dtype)) if initial_state is None else initial_state
    outputs, finals = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        state = states[i : i + 1]
        if end > begin:
            rows = slice(begin, end)
            o, state = form(q[:, rows], k[:, rows], v[:, rows], slopes, state)
            outputs.append(o)
        finals.append(state)
    return torch.cat(outputs, dim=1), torch.cat(finals)
