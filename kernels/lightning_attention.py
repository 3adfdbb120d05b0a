"""The public operator: decayed linear attention with checks, backends, custom ops and gradients.

`S_t = λ S_{t-1} + k_tᵀ v_t`, `o_t = q_t S_t`, `λ = exp(-slope)` per head (Lightning Attention-2,
arXiv 2401.04658). Forward, backward and the one-token step are registered custom ops, so torch.compile keeps
them whole and tracing needs no Triton. Optional tensors leave an op as empty ones, since ops return no None.

Shapes: q, k (B, N, H, Dk); v, o (B, N, H, Dv); slopes (H,); state (B, H, Dk, Dv), or (S, H, Dk, Dv) for the
S sequences of cu_seqlens. B batch, N sequence, H heads, Dk and Dv head dims.
"""

import os

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.forward_ad import unpack_dual

from kernels import reference, torch_lightning
from kernels.launch import num_segments
from kernels.reference import compute_dtype, without_autocast

BACKENDS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with a fixed decay per head, in time linear in N.

    Args:
        q, k: (B, N, H, Dk), v: (B, N, H, Dv), of one dtype: fp32, bf16 or fp16; fp64 except for `triton`.
            Head dims are multiples of 8 up to 256. Any strides.
        slopes: (H,) fp32, 0 to 1e38; a head decays by exp(-slope) per token. No gradient.
        initial_state: (B, H, Dk, Dv) fp32 (fp64 for fp64 inputs, as the final state is), the state before the
            first token; zero if None.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: (S + 1,) int32, for B = 1: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1], possibly
            none. States are then (S, H, Dk, Dv).
        backend: `triton`, `torch` (chunked, any device), `reference` (token by token, no custom op: a graph
            breaks at its cu_seqlens), or `auto`: triton on CUDA devices, torch elsewhere.

    Returns:
        o (B, N, H, Dv) in the inputs' dtype, and the final state (None unless asked for). Gradients reach q,
        k, v and initial_state, also through the final state: in reverse mode, and once; `reference` has
        forward mode and second derivatives too. A value that is not finite spreads to other rows and
        sequences of the batch.

    Raises:
        ValueError: an argument is off; the message names it, what came and what is allowed.
    """
    check_inputs(q, k, v, slopes, num_dims=4)
    num_sequences = check_cu_seqlens(q, cu_seqlens)
    _check_state("initial_state", initial_state, q, v, num_sequences)
    backend = choose_backend(backend, q)
    if needs_fp32(q, backend):
        o, state = lightning_attention(
            q.float(), k.float(), v.float(), slopes, initial_state, output_final_state, cu_seqlens, backend
        )
        return o.to(q.dtype), state
    if backend == "reference":
        o, state = _reference(q, k, v, slopes, initial_state, cu_seqlens)
    else:
        check_no_tangents(q=q, k=k, v=v, initial_state=initial_state)
        o, state, _ = _forward(q, k, v, slopes, initial_state, output_final_state, cu_seqlens, backend)
    return o, state if output_final_state else None


def lightning_attention_step(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of lightning_attention, for decoding: the cost is the same at every position.

    Args:
        q, k: (B, H, Dk), v: (B, H, Dv), of one dtype.
        slopes: (H,) fp32, >= 0.
        state: (B, H, Dk, Dv) fp32 (fp64 for fp64 inputs), left as it is.

    Returns:
        o (B, H, Dv) in the inputs' dtype and the new state. No gradients.

    Raises:
        ValueError: an argument is off; the message names it, what came and what is allowed.
    """
    check_inputs(q, k, v, slopes, num_dims=3)
    if state is None:
        raise ValueError(
            "state is None; allowed: a tensor (B, H, Dk, Dv). Start from zeros or a final state."
        )
    _check_state("state", state, q, v, q.shape[0])
    check_no_tangents(q=q, k=k, v=v, state=state)
    return _step(q, k, v, slopes, state)


def default_backend(device: torch.device | str) -> str:
    """The backend that `auto` stands for on a device: `triton` on CUDA, `torch` elsewhere."""
    return "triton" if torch.device(device).type == "cuda" else "torch"


def needs_fp32(q: Tensor, backend: str) -> bool:
    """Whether to multiply fp32 copies: Triton's interpreter takes the bits of bf16 for whole numbers."""
    return backend == "triton" and q.device.type != "cuda" and q.dtype == torch.bfloat16


def _reference(q, k, v, slopes, initial_state, cu_seqlens) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return reference.recurrent(q, k, v, slopes, initial_state)
    return reference.per_sequence(reference.recurrent, q, k, v, slopes, initial_state, cu_seqlens)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, num_dims: int) -> None:
    """Raise a ValueError that names what is off; num_dims is 4, or 3 for a step."""
    dims = "(B, N, H, D)" if num_dims == 4 else "(B, H, D)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
        if x.layout != torch.strided:
            raise ValueError(f"{name} has layout {x.layout}; allowed: torch.strided. Use {name}.to_dense().")
        if x.dim() != num_dims or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {dims}, no size 0.")
        if x.shape[-1] % 8 or x.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} has head dim {x.shape[-1]}; allowed: multiples of 8 up to {MAX_HEAD_DIM}. "
                "Pad it with zeros."
            )
        if x.dtype not in (*DTYPES, torch.float64):
            raise ValueError(f"{name} has dtype {x.dtype}; allowed: float32, bfloat16, float16, float64.")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; make them alike."
            )
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; allowed: q's, {tuple(q.shape)}.")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}; allowed: q's, {tuple(q.shape)}, except for the last size."
        )
    _check_slopes(slopes, q)


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; allowed: a tensor.")


def _check_slopes(slopes: Tensor, q: Tensor) -> None:
    _check_tensor("slopes", slopes)
    num_heads = q.shape[-2]
    if slopes.shape != (num_heads,) or slopes.dtype != torch.float32 or slopes.device != q.device:
        raise ValueError(
            f"slopes is {slopes.dtype} {tuple(slopes.shape)} on {slopes.device}; "
            f"allowed: float32 ({num_heads},), one per head, on {q.device}."
        )
    if slopes.requires_grad:
        raise ValueError("slopes requires a gradient; allowed: fixed slopes only. Pass slopes.detach().")
    if _values_are_cheap(slopes) and not bool(((slopes >= 0) & slopes.isfinite()).all()):
        raise ValueError(
            f"slopes holds {slopes.tolist()}; allowed: finite values >= 0 (decay is exp(-slope))."
        )


def check_no_tangents(**inputs: Tensor | None) -> None:
    """Refuse forward-mode derivatives: a custom op would take them for zero without a word."""
    if torch.compiler.is_compiling():
        return
    for name, x in inputs.items():
        if x is not None and unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{name} has a forward-mode tangent; allowed: reverse mode (autograd), or the backend "
                "'reference' of lightning_attention."
            )


def check_cu_seqlens(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences; a ValueError names what is off."""
    if cu_seqlens is None:
        return q.shape[0]
    _check_tensor("cu_seqlens", cu_seqlens)
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs B = 1; q has B = {q.shape[0]}. Pack all sequences along N.")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; "
            "allowed: int32 (num_sequences + 1,)."
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; allowed: q's device, {q.device}.")
    if _values_are_cheap(cu_seqlens):
        ends = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if ends != (0, q.shape[1]) or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens goes from {ends[0]} to {ends[1]}; "
                f"allowed: from 0 to N = {q.shape[1]}, never falling."
            )
    return len(cu_seqlens) - 1


def _check_state(name: str, state: Tensor | None, q: Tensor, v: Tensor, num_sequences: int) -> None:
    if state is None:
        return
    _check_tensor(name, state)
    shape, dtype = (num_sequences, q.shape[-2], q.shape[-1], v.shape[-1]), compute_dtype(q.dtype)
    if state.shape != shape or state.dtype != dtype or state.device != q.device:
        raise ValueError(
            f"{name} is {state.dtype} {tuple(state.shape)} on {state.device}; "
            f"allowed: {dtype} {tuple(shape)} on {q.device}, one per sequence and head."
        )


def _values_are_cheap(x: Tensor) -> bool:
    """Values are checked where reading them neither waits for a device nor breaks a compiled graph."""
    is_fake = isinstance(x, FakeTensor)
    return x.device.type == "cpu" and not is_fake and not torch.compiler.is_compiling()


def choose_backend(backend: str, q: Tensor) -> str:
    """The backend that `backend` stands for; a ValueError says why it can't be."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}.")
    if backend == "auto":
        backend = default_backend(q.device)
    if backend == "triton" and q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; allowed with backend='triton': float32, bfloat16, float16.")
    if backend == "triton" and q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs a CUDA device and q is on {q.device}; use backend='auto', "
            "or Triton's interpreter (TRITON_INTERPRET=1)."
        )
    return backend


def _implementation(backend: str):
    """The module that computes; Triton is imported on first use only."""
    if backend == "torch":
        return torch_lightning
    from kernels import triton_lightning

    return triton_lightning


def _state_shapes(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, has_states: bool, backend: str
) -> tuple[tuple, tuple]:
    """Shapes of the final state and of the states between segments (none where sequences are not cut).

    Packed sequences without states of their own (`has_states`) are cut as one.
    """
    num_sequences = q.shape[0] if cu_seqlens is None or not has_states else cu_seqlens.shape[0] - 1
    segments = 1
    if backend == "triton":
        head_dim = torch.sym_max(q.shape[3], v.shape[3])
        segments = num_segments(num_sequences, q.shape[0] * q.shape[1], q.shape[2], head_dim, q.device)
    state = q.shape[2], q.shape[3], v.shape[3]
    return (num_sequences, *state), (num_sequences, segments - 1, *state)


@torch.library.custom_op("lightning_attention::forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state (empty unless asked for) and the states between segments, which backward reuses."""
    o, final_state, segment_states = _forward_outputs(
        q, v, initial_state, output_final_state, cu_seqlens, backend
    )
    final = final_state if output_final_state else None
    run = _implementation(backend).forward
    with torch.cuda.device_of(q):  # Triton launches on the current device
        run(q, k, v, slopes, initial_state, cu_seqlens, o, final, segment_states)
    return o, final_state, segment_states


def _forward_outputs(
    q, v, initial_state, output_final_state, cu_seqlens, backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten outputs of the forward op."""
    dtype = compute_dtype(q.dtype)
    has_states = initial_state is not None or output_final_state
    final_shape, segment_shape = _state_shapes(q, v, cu_seqlens, has_states, backend)
    final_state = q.new_empty(final_shape if output_final_state else 0, dtype=dtype)
    return q.new_empty(v.shape), final_state, q.new_empty(segment_shape, dtype=dtype)


@_forward.register_fake
def _(q, k, v, slopes, initial_state, output_final_state, cu_seqlens, backend):
    return _forward_outputs(q, v, initial_state, output_final_state, cu_seqlens, backend)


@torch.library.custom_op("lightning_attention::backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    segment_states: Tensor,
    grad_o: Tensor,
    grad_final: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state (empty where there is none)."""
    dq, dk, dv, dinitial = _backward_outputs(q, k, v, initial_state)
    run = _implementation(backend).backward
    with torch.cuda.device_of(q):
        run(
            q, k, v, slopes, initial_state, cu_seqlens, segment_states, grad_o, grad_final,
            dq, dk, dv, None if initial_state is None else dinitial,
        )  # fmt: skip
    return dq, dk, dv, dinitial


def _backward_outputs(q, k, v, initial_state) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten outputs of the backward op."""
    dinitial = q.new_empty(0, dtype=compute_dtype(q.dtype)) if initial_state is None else initial_state
    return *(x.new_empty(x.shape) for x in (q, k, v)), dinitial.new_empty(dinitial.shape)


@_backward.register_fake
def _(q, k, v, slopes, initial_state, cu_seqlens, segment_states, grad_o, grad_final, backend):
    return _backward_outputs(q, k, v, initial_state)


def _save_for_backward(ctx, inputs, output):
    q, k, v, slopes, initial_state, output_final_state, cu_seqlens, backend = inputs
    ctx.save_for_backward(q, k, v, slopes, initial_state, cu_seqlens, output[2])
    ctx.output_final_state, ctx.backend = output_final_state, backend
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx, grad_o, grad_final, _):
    q, k, v, slopes, initial_state, cu_seqlens, segment_states = ctx.saved_tensors
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    if not ctx.output_final_state:
        grad_final = None
    dq, dk, dv, dinitial = _backward(
        q, k, v, slopes, initial_state, cu_seqlens, segment_states, grad_o, grad_final, ctx.backend
    )
    return dq, dk, dv, None, None if initial_state is None else dinitial, None, None, None


_forward.register_autograd(_backward_of_forward, setup_context=_save_for_backward)


@torch.library.custom_op("lightning_attention::step", mutates_args=())
def _step(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    if default_backend(q.device) == "triton" and q.dtype in DTYPES:
        with torch.cuda.device_of(q):
            return _implementation("triton").step(q, k, v, slopes, state)
    return _torch_step(q, k, v, slopes, state)


@without_autocast
def _torch_step(q, k, v, slopes, state) -> tuple[Tensor, Tensor]:
    dtype = state.dtype
    decay = torch.exp(-slopes.to(dtype))[:, None, None]
    state = decay * state + k.to(dtype)[..., :, None] * v.to(dtype)[..., None, :]
    o = (q.to(dtype)[..., None, :] @ state).squeeze(-2)
    return o.to(q.dtype), state


@_step.register_fake
def _(q, k, v, slopes, state):
    return q.new_empty(v.shape), state.new_empty(state.shape)
