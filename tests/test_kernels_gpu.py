"""The Triton kernels compiled for a real GPU, against the PyTorch backend in float64, at real sizes.

pytest -m gpu tests/test_kernels_gpu.py
FUZZ_SHAPES=1000 pytest -m gpu tests/test_kernels_gpu.py -k fuzz
FUZZ_SHAPES=20 compute-sanitizer --tool memcheck python -m pytest -m gpu tests/test_kernels_gpu.py -k fuzz
"""

import os
import random

import pytest
import torch

from kernels import lightning_attention, lightning_attention_step
from kernels.launch import force

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

TOLERANCES = {torch.bfloat16: 2.8e-3, torch.float16: 4e-4, torch.float32: 1e-5}
NAMES = ["o", "final", "dq", "dk", "dv", "dinitial"]


def make_inputs(B, N, H, Dk, Dv, dtype, num_states=None, seed=0):
    """q, k, v, initial_state, gradients of o and of the final state, scaled as in a model; slopes."""
    generator = torch.Generator("cuda").manual_seed(seed)
    state = (num_states or B, H, Dk, Dv)
    shapes = [(B, N, H, Dk), (B, N, H, Dk), (B, N, H, Dv), state, (B, N, H, Dv), state]
    dtypes = [dtype, dtype, dtype, torch.float32, dtype, torch.float32]
    tensors = [
        torch.randn(s, device="cuda", generator=generator).to(d) for s, d in zip(shapes, dtypes, strict=True)
    ]
    slopes = torch.rand(H, device="cuda", generator=generator) ** 4 * 9
    slopes[0] = 0
    return tensors, slopes


def run(tensors, slopes, backend, cu_seqlens=None, with_states=True):
    q, k, v, state = (x.detach().requires_grad_() for x in tensors[:4])
    grad_o, grad_final = tensors[4:]
    if not with_states:
        o, _ = lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens, backend=backend)
        return [o, *torch.autograd.grad(o, [q, k, v], grad_o)]
    o, final = lightning_attention(q, k, v, slopes, state, True, cu_seqlens, backend)
    return [o, final, *torch.autograd.grad([o, final], [q, k, v, state], [grad_o, grad_final])]


def assert_close(tensors, slopes, cu_seqlens=None, with_states=True):
    truths = run([x.double() for x in tensors], slopes, "torch", cu_seqlens, with_states)
    results = run(tensors, slopes, "triton", cu_seqlens, with_states)
    names = NAMES if with_states else ["o", "dq", "dk", "dv"]
    for name, x, truth in zip(names, results, truths, strict=True):
        error = float((x.double() - truth).norm() / truth.norm().clamp(min=1e-30))
        few = truth.numel() < 1000  # rounding a handful of numbers may well be worse than on average
        assert error <= TOLERANCES[tensors[0].dtype] * (2 if few else 1), (name, error)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("B", "N", "H", "Dk", "Dv"),
    [
        (2, 1000, 4, 128, 128),
        (1, 4097, 3, 64, 64),
        (1, 2111, 2, 256, 256),
        (1, 1500, 2, 256, 128),
        (2, 777, 3, 96, 192),
        (3, 63, 5, 8, 24),
        (1, 1, 1, 16, 16),
        (300, 65, 2, 32, 64),
    ],
)
def test_outputs_and_gradients(B, N, H, Dk, Dv, dtype):
    assert_close(*make_inputs(B, N, H, Dk, Dv, dtype))


@pytest.mark.parametrize(
    ("dtype", "gluon"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)]
)
@pytest.mark.parametrize("segments", [1, 2, 7])
def test_segments(segments, dtype, gluon):
    """On a Hopper both forms of the kernels; elsewhere there is one."""
    changes = {} if gluon else {"gluon": False}
    with force(segments=segments, **changes):
        assert_close(*make_inputs(2, 3001, 2, 128, 128, dtype))


def random_bounds(generator: random.Random, N: int, num_documents: int) -> torch.Tensor:
    """cu_seqlens of documents of random length, the first and the last one empty."""
    bounds = sorted([0, 0, N, N, *(generator.randrange(N) for _ in range(num_documents))])
    return torch.tensor(bounds, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize(("Dk", "Dv"), [(128, 128), (128, 64), (256, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("segments", [1, 5])
def test_packed_documents_of_random_length(segments, dtype, Dk, Dv, with_states):
    """Without states of their own documents are walked as one, many to a chunk."""
    cu_seqlens = random_bounds(random.Random(0), 9000, 60 if with_states else 300)
    tensors, slopes = make_inputs(1, 9000, 2, Dk, Dv, dtype, num_states=len(cu_seqlens) - 1)
    with force(segments=segments, parts=3):
        assert_close(tensors, slopes, cu_seqlens, with_states)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("dim", [64, 128])  # on a Hopper one form of the kernels each
def test_packed_sequences_leave_no_rounding_in_others(dim, segments):
    """Where weights are split, as at a slope of 0.01; every sequence goes on in the next chunk."""
    tensors, slopes = make_inputs(1, 500, 2, dim, dim, torch.bfloat16)
    slopes[:] = torch.tensor([0.01, 1.0])
    cu_seqlens = torch.tensor([0, 100, 240, 500], dtype=torch.int32, device="cuda")
    with force(segments=segments):
        before = run(tensors, slopes, "triton", cu_seqlens, with_states=False)
        for i in (0, 1, 2, 4):
            tensors[i][:, 100:240] *= 1000
        after = run(tensors, slopes, "triton", cu_seqlens, with_states=False)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :100], y[:, :100])
        assert torch.equal(x[:, 240:], y[:, 240:])


def test_fuzz():
    """Random shapes over a few head dims, since each pair of dims compiles its own kernels."""
    generator = random.Random(0)
    for seed in range(int(os.environ.get("FUZZ_SHAPES", "150"))):
        Dk, Dv = generator.choice([(64, 64), (128, 128), (96, 40), (256, 128)])
        B, N, H = generator.randint(1, 4), generator.randint(1, 700), generator.randint(1, 6)
        dtype = generator.choice(list(TOLERANCES))
        packed = random_bounds(generator, N, generator.randint(0, 40)) if B == 1 else None
        with force(segments=generator.randint(1, 8), parts=generator.randint(1, 4)):
            assert_close(*make_inputs(B, N, H, Dk, Dv, dtype, seed=seed), packed, with_states=packed is None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0, 4.0, 8.0])
@pytest.mark.parametrize(("Dk", "Dv"), [(64, 64), (128, 128), (256, 128)])
def test_a_head_of_any_slope_by_itself(Dk, Dv, slope, dtype):
    """Beside a slow head's gradients those of a fast one's initial state would not count."""
    tensors, slopes = make_inputs(2, 300, 1, Dk, Dv, dtype)
    slopes[0] = slope
    assert_close(tensors, slopes)


def test_addresses_beyond_32_bits():
    """2^31 elements and more in one tensor; the last rows are checked against a pass over them alone."""
    B, N, H, D = 1, 1_100_000, 16, 128
    q, k, v = (torch.randn(B, N, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    slopes = torch.full((H,), 1.0, device="cuda")
    o, _ = lightning_attention(q, k, v, slopes)
    tail, _ = lightning_attention(*(x[:, -1000:].double() for x in (q, k, v)), slopes, backend="torch")
    error = (o[:, -500:].double() - tail[:, -500:]).norm() / tail[:, -500:].norm()
    assert float(error) <= TOLERANCES[torch.bfloat16]


def test_repeats_give_the_same_bits():
    tensors, slopes = make_inputs(1, 8192, 4, 128, 128, torch.bfloat16)
    first, second = run(tensors, slopes, "triton"), run(tensors, slopes, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_new_shape_of_the_batch_does_not_recompile():
    from kernels import hopper_lightning, triton_lightning

    modules = (hopper_lightning, triton_lightning)
    kernels = [getattr(module, name) for module in modules for name in ("walk_kernel", "dk_dv_kernel")]

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(*make_inputs(1, 3000, 4, 128, 128, torch.bfloat16), "triton")
    before = compiled()
    assert before > 0
    for B, N, H in ((1, 1, 4), (2, 17, 3), (1, 4096, 1), (3, 5001, 8)):
        run(*make_inputs(B, N, H, 128, 128, torch.bfloat16), "triton")
    assert compiled() == before


def test_compiles_into_one_graph():
    (q, k, v, state, *_), slopes = make_inputs(1, 500, 2, 64, 64, torch.bfloat16)

    def function(q, k, v, state):
        o, final = lightning_attention(q * q.sigmoid(), k, v, slopes, state, True)
        return o.float().sum() + final.sum()

    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        inputs = [x.detach().requires_grad_() for x in (q, k, v, state)]
        value = call(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("Dk", "Dv"), [(128, 128), (256, 128), (24, 200)])
def test_prefill_and_steps_equal_one_pass(Dk, Dv, dtype):
    (q, k, v, state, *_), slopes = make_inputs(2, 300, 3, Dk, Dv, dtype)
    exact = [x.double() for x in (q, k, v)]
    truth, final = lightning_attention(*exact, slopes, state.double(), True, backend="torch")
    _, running = lightning_attention(*(x[:, :290] for x in (q, k, v)), slopes, state, True)
    for t in range(290, 300):
        o, running = lightning_attention_step(q[:, t], k[:, t], v[:, t], slopes, running)
        assert float((o.double() - truth[:, t]).norm() / truth[:, t].norm()) <= TOLERANCES[dtype]
    assert float((running.double() - final).norm() / final.norm()) <= TOLERANCES[dtype]
