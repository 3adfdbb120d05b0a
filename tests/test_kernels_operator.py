"""lightning_attention against float64: outputs, states and every gradient, for each backend."""

import pytest
import torch
from kernel_helpers import DEVICE, TOLERANCE, make_inputs, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import lightning_attention, lightning_attention_step, reference, torch_lightning
from kernels.launch import Warps, force
from kernels.quadratic import quadratic_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKENDS = ["torch", "triton"]
FUSED = Warps(4, 2)  # dk and dv in one kernel
# (backend, segments, dk_dv) of packed sequences; the PyTorch backend is not cut up by a launch.
WALKS = [("torch", 1, None), *(("triton", segments, dk_dv) for segments in (1, 3) for dk_dv in (FUSED, None))]


def run(tensors, slopes, backend, cu_seqlens=None, with_state=True):
    """o, final state and the gradients of q, k, v and the initial state."""
    q, k, v, state = (x.detach().requires_grad_() for x in tensors[:4])
    grad_o, grad_final = tensors[4:]
    o, final = lightning_attention(q, k, v, slopes, state if with_state else None, True, cu_seqlens, backend)
    inputs = [q, k, v] + [state] * with_state
    return [o, final, *torch.autograd.grad([o, final], inputs, [grad_o, grad_final])]


def expected(tensors, slopes, cu_seqlens=None, with_state=True):
    return run([x.double() for x in tensors], slopes, "reference", cu_seqlens, with_state)


def assert_close(results, truths, tolerance=TOLERANCE):
    names = ["o", "final", "dq", "dk", "dv", "dinitial"]
    errors = {n: relative_error(r, t) for n, r, t in zip(names, results, truths, strict=False)}
    assert all(error <= tolerance for error in errors.values()), errors


# (N, Dk, Dv, segments, chunk): every length and head dim of interest, each chunk size, one and more segments.
# Chunks of 64 run dk and dv in one kernel, others in two.
CASES = [
    (1, 16, 24, 1, 16),
    (1, 128, 96, 2, 64),
    (130, 24, 48, 2, 64),
    (15, 24, 16, 1, 16),
    (16, 64, 96, 2, 16),
    (17, 96, 64, 3, 16),
    (63, 128, 192, 1, 64),
    (64, 192, 128, 1, 64),
    (65, 16, 16, 2, 64),
    (65, 128, 128, 2, 16),
    (40, 8, 256, 3, 16),
    (100, 24, 192, 2, 32),
    (129, 96, 24, 3, 32),
    (130, 16, 24, 7, 16),
    (257, 64, 64, 1, 64),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "Dk", "Dv", "segments", "chunk"), CASES)
def test_outputs_and_gradients(N, Dk, Dv, segments, chunk, backend):
    tensors, slopes = make_inputs(1, N, 4, Dk, Dv)
    with force(segments=segments, parts=min(segments, 3), chunk=chunk, dk_dv=FUSED if chunk == 64 else None):
        assert_close(run(tensors, slopes, backend), expected(tensors, slopes))


@pytest.mark.parametrize("dk_dv", [FUSED, None])
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0, 4.0, 9.0, 40.0, 200.0])
def test_weights_split_around_their_mean(slope, dk_dv):
    """Of heads of every slope by themselves: beside a slow head's gradients a fast one's don't count."""
    tensors, slopes = make_inputs(1, 50, 1, 16, 24)
    slopes[0] = slope
    with force(segments=2, chunk=16, dk_dv=dk_dv, split_weights=True):
        results, truths = run(tensors, slopes, "triton"), expected(tensors, slopes)
    if slope > 40:  # what is left of the initial state's is below fp32's range
        results, truths = results[:-1], truths[:-1]
    assert_close(results, truths)


@pytest.mark.parametrize(("backend", "segments"), [("torch", 1), ("triton", 1), ("triton", 2), ("triton", 7)])
def test_batches_without_initial_state(backend, segments):
    tensors, slopes = make_inputs(2, 50, 2, 16, 32)
    with force(segments=segments, chunk=16, dk_dv=FUSED):
        assert_close(
            run(tensors, slopes, backend, with_state=False), expected(tensors, slopes, with_state=False)
        )


@pytest.mark.parametrize(
    ("bounds", "backend", "segments", "dk_dv"),
    [
        *((bounds, *walk) for bounds in ([0, 0, 1, 40, 41, 41, 90, 90], [0, 16, 32, 90]) for walk in WALKS),
        ([0, 0, 1, 40], "triton", 7, None),
    ],
)
def test_packed_sequences(bounds, backend, segments, dk_dv):
    tensors, slopes = make_inputs(1, bounds[-1], 2, 16, 24, num_states=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    with force(segments=segments, parts=min(segments, 2), chunk=16, dk_dv=dk_dv):
        assert_close(run(tensors, slopes, backend, cu_seqlens), expected(tensors, slopes, cu_seqlens))


@pytest.mark.parametrize(
    ("chunk", "backend", "segments", "dk_dv"),
    [*((16, *walk) for walk in WALKS), *((64, "triton", segments, FUSED) for segments in (1, 2, 7))],
)
@pytest.mark.parametrize("bounds", [[0, 0, 1, 5, 16, 17, 17, 60, 61, 63, 150], [0, 150], [0, 64, 128, 150]])
def test_packed_sequences_without_states(bounds, chunk, backend, segments, dk_dv):
    """They are walked as one: chunks hold several sequences, and sequences go over segments."""
    (q, k, v, _, grad_o, _), slopes = make_inputs(1, 150, 2, 16, 24)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def outputs(dtype, backend):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        o, _ = lightning_attention(*inputs, slopes, cu_seqlens=cu_seqlens, backend=backend)
        return [o, *torch.autograd.grad(o, inputs, grad_o.to(dtype))]

    with force(segments=segments, parts=min(segments, 3), chunk=chunk, dk_dv=dk_dv):
        results = outputs(torch.float32, backend)
    for result, truth in zip(results, outputs(torch.float64, "reference"), strict=True):
        assert relative_error(result, truth) <= TOLERANCE


def test_torch_backend_carries_states_over_blocks_of_chunks():
    bounds = [0, 1030, 1030, 1031, 1100, 3500]
    tensors, slopes = make_inputs(1, 3500, 3, 8, 16, num_states=5)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    assert_close(run(tensors, slopes, "torch", cu_seqlens), expected(tensors, slopes, cu_seqlens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_do_not_see_each_other(backend):
    tensors, slopes = make_inputs(1, 60, 2, 16, 16, num_states=3)
    cu_seqlens = torch.tensor([0, 20, 40, 60], dtype=torch.int32, device=DEVICE)
    before = run(tensors, slopes, backend, cu_seqlens)
    for i in (0, 1, 2, 4):
        tensors[i][:, 20:40] *= 1000
    after = run(tensors, slopes, backend, cu_seqlens)
    for x, y in zip(before, after, strict=True):  # (1, 60, ...) or, for states, (3, ...)
        x, y = x.reshape(3, -1), y.reshape(3, -1)
        assert torch.equal(x[[0, 2]], y[[0, 2]])


@pytest.mark.parametrize("dk_dv", [FUSED, None])
@pytest.mark.parametrize("segments", [1, 3])
def test_split_weights_leave_no_rounding_of_other_sequences(segments, dk_dv):
    """Walked as one, where a chunk holds rows of several sequences, each continued in the next chunk."""
    tensors, slopes = make_inputs(1, 96, 2, 16, 16)
    slopes[:] = torch.tensor([0.01, 1.0])
    cu_seqlens = torch.tensor([0, 40, 52, 96], dtype=torch.int32, device=DEVICE)

    def run_without_states():
        inputs = [x.detach().requires_grad_() for x in tensors[:3]]
        o, _ = lightning_attention(*inputs, slopes, None, False, cu_seqlens, "triton")
        return [o, *torch.autograd.grad(o, inputs, tensors[4])]

    with force(segments=segments, parts=1, chunk=32, dk_dv=dk_dv, split_weights=True):
        before = run_without_states()
        for i in (0, 1, 2, 4):
            tensors[i][:, 40:52] *= 1000
        after = run_without_states()
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :40], y[:, :40])
        assert torch.equal(x[:, 52:], y[:, 52:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["one projection", "heads first", "unaligned", "expanded", "states"])
def test_strided_inputs(backend, layout):
    (q, k, v, state, grad_o, grad_final), slopes = make_inputs(2, 37, 2, 16, 16)
    truth = expected((q, k, v, state, grad_o, grad_final), slopes)
    if layout == "one projection":  # the rows between hold NaN
        buffer = torch.full((2, 37, 4, 2, 24), float("nan"), device=DEVICE)
        buffer[:, :, :3, :, :16] = torch.stack([q, k, v], dim=2)
        q, k, v = (buffer[:, :, i, :, :16] for i in range(3))
    elif layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "unaligned":
        q, k, v = (torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (q, k, v))
    elif layout == "expanded":
        grad_o = torch.ones((), device=DEVICE).expand_as(grad_o)
        grad_final = torch.ones((), device=DEVICE).expand_as(grad_final)
        truth = expected((q, k, v, state, grad_o, grad_final), slopes)
    else:
        state, grad_final = (x.mT.contiguous().mT for x in (state, grad_final))
    assert_close(run((q, k, v, state, grad_o, grad_final), slopes, backend), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_the_final_state_alone(backend):
    tensors, slopes = make_inputs(1, 40, 2, 16, 16)
    results = []
    for inputs, kind in ((tensors, backend), ([x.double() for x in tensors], "reference")):
        q, k, v, state = (x.detach().requires_grad_() for x in inputs[:4])
        _, final = lightning_attention(q, k, v, slopes, state, True, backend=kind)
        results.append(torch.autograd.grad(final, [k, v, state], inputs[5]))
    for result, truth in zip(*results, strict=True):
        assert relative_error(result, truth) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_does_not_change_the_past(backend):
    (q, k, v, state, *_), slopes = make_inputs(1, 70, 2, 16, 16)
    before, _ = lightning_attention(q, k, v, slopes, state, backend=backend)
    for x in (q, k, v):
        x[:, 33:] *= -1000
    after, _ = lightning_attention(q, k, v, slopes, state, backend=backend)
    assert torch.equal(before[:, :33], after[:, :33])
    assert (before[:, 33:] != after[:, 33:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_and_steps_equal_one_pass(backend):
    (q, k, v, state, *_), slopes = make_inputs(2, 21, 3, 24, 16)
    whole, final = lightning_attention(q, k, v, slopes, state, True, backend=backend)
    head = [x[:, :18] for x in (q, k, v)]
    o, running = lightning_attention(*head, slopes, state, True, backend=backend)
    outputs = [o]
    for t in range(18, 21):
        kept = running.clone()
        o, new = lightning_attention_step(q[:, t], k[:, t], v[:, t], slopes, running)
        assert torch.equal(running, kept)
        outputs.append(o[:, None])
        running = new
    assert relative_error(torch.cat(outputs, dim=1), whole.double()) <= TOLERANCE
    assert relative_error(running, final.double()) <= TOLERANCE


def test_triton_step_equals_the_definition():
    from kernels import triton_lightning

    (q, k, v, state, *_), slopes = make_inputs(2, 1, 3, 24, 200)
    o, new = triton_lightning.step(q[:, 0], k[:, 0], v[:, 0], slopes, state)
    truth = reference.recurrent(q.double(), k.double(), v.double(), slopes, state.double())
    assert_close([o[:, None], new], truth)


def test_the_three_references_agree():
    tensors, slopes = make_inputs(2, 45, 3, 16, 24)
    q, k, v, state = (x.double() for x in tensors[:4])
    truth = reference.recurrent(q, k, v, slopes, state)
    for results in (
        reference.quadratic(q, k, v, slopes, state),
        reference.chunked(q, k, v, slopes, state, chunk=16),
    ):
        assert_close(results, truth, 1e-13)


def test_recurrence_by_hand():
    q, k, v = (
        torch.tensor(x)[None, :, None, None].repeat(1, 1, 1, 8) for x in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])
    )
    slopes = torch.tensor([0.5])
    decay = float(torch.exp(-slopes))
    o, state = lightning_attention(q, k, v, slopes, output_final_state=True, backend="reference")
    last = decay * 15.0 + 24.0
    torch.testing.assert_close(o[0, :, 0, 0], torch.tensor([8 * 15.0, 8 * 2 * last]))
    torch.testing.assert_close(state, torch.full((1, 1, 8, 8), last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, dtype):
    """In Triton's interpreter too, which by itself takes the bits of bf16 for whole numbers."""
    tensors, slopes = make_inputs(1, 130, 3, 16, 16, dtype=dtype)
    results = run(tensors, slopes, backend)
    assert [x.dtype for x in results] == [dtype, torch.float32, dtype, dtype, dtype, torch.float32]
    assert_close(
        results, expected(tensors, slopes), 2.4e-3 if DEVICE == "cpu" or backend == "torch" else 5e-3
    )


def test_segments_do_not_change_the_outcome_of_a_repeat():
    tensors, slopes = make_inputs(1, 100, 2, 16, 16)
    with force(segments=3, chunk=16):
        first, second = run(tensors, slopes, "triton"), run(tensors, slopes, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class _Operations(TorchDispatchMode):
    """Counts operations and remembers the largest result."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.count += 1
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


def test_torch_backend_is_linear_in_memory_and_loops_over_neither_tokens_nor_documents():
    N, H, D = 8192, 1, 8
    (q, k, v, *_), slopes = make_inputs(1, N, H, D, D)
    bounds = torch.linspace(0, N, 1001, device=DEVICE).int()
    for cu_seqlens in (None, bounds):
        o = torch.empty_like(v)
        with _Operations() as operations:
            torch_lightning.forward(q, k, v, slopes, None, cu_seqlens, o, None, None)
        assert operations.largest <= 16 * N * D
        assert operations.count <= 16_000  # a loop over 1,000 documents takes over 100 for each


@pytest.mark.parametrize("misplaced", range(3))
def test_inputs_may_begin_anywhere(misplaced):
    """TMA can't load a contiguous tensor that does not begin at a multiple of 16 bytes."""
    tensors, slopes = make_inputs(1, 20, 2, 16, 16)
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x) for x in tensors[:3]]
    assert shifted[0].is_contiguous()
    assert shifted[0].data_ptr() % 16
    given = [*tensors[:misplaced], shifted[misplaced], *tensors[misplaced + 1 :]]
    assert_close(run(given, slopes, "triton"), expected(tensors, slopes))
    quadratic = quadratic_attention(*given[:3], slopes, backend="triton")
    assert relative_error(quadratic, quadratic_attention(*tensors[:3], slopes, backend="torch")) < TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_changes_nothing(backend):
    tensors, slopes = make_inputs(1, 70, 2, 16, 24)
    plain, step = run(tensors, slopes, backend), [x[:, 0] for x in tensors[:3]]
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = run(tensors, slopes, backend)
        o, state = lightning_attention_step(*step, slopes, tensors[3])
    assert_close(cast[:2], plain[:2], 1e-7)
    if backend == "torch":
        assert_close(cast, plain, 1e-7)
    expected_o, expected_state = lightning_attention_step(*step, slopes, tensors[3])
    assert torch.equal(o, expected_o)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_forward_mode_is_refused_except_by_the_reference(needs_gradient):
    """A custom op drops the tangents of inputs without a gradient: the derivative would be zero."""
    (q, k, v, state, tangent, _), slopes = make_inputs(1, 9, 2, 8, 8)
    q.requires_grad_(needs_gradient)

    def derivative(backend):
        return torch.func.jvp(
            lambda q: lightning_attention(q, k, v, slopes, backend=backend)[0], (q,), (tangent,)
        )[1]

    linear = lightning_attention(tangent, k, v, slopes, backend="reference")[0]
    torch.testing.assert_close(derivative("reference"), linear)
    with pytest.raises(ValueError, match="q has a forward-mode tangent"):
        derivative("torch")
    with pytest.raises(ValueError, match="q has a forward-mode tangent"):
        torch.func.jvp(lambda q: quadratic_attention(q, k, v, slopes, backend="triton"), (q,), (tangent,))
    with pytest.raises(ValueError, match="q has a forward-mode tangent"):
        torch.func.jvp(
            lambda q: lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], slopes, state)[0], (q,), (tangent,)
        )
