"""Lightning Attention-1 against float64: outputs and every gradient, in PyTorch and Triton."""

import re

import pytest
import torch
from kernel_helpers import DEVICE, TOLERANCE, make_inputs, relative_error

from kernels import reference
from kernels.quadratic import quadratic_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(form, tensors):
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    o = form(q, k, v)
    return [o, *torch.autograd.grad(o, (q, k, v), tensors[4].to(o.dtype))]


def check(N, Dk, Dv, backend, bounds=None, B=1, dtype=torch.float32, tolerance=TOLERANCE):
    tensors, slopes = make_inputs(B, N, 4, Dk, Dv, dtype=dtype)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def expected(q, k, v):
        if bounds is None:
            return reference.quadratic(q, k, v, slopes)[0]
        return reference.per_sequence(reference.quadratic, q, k, v, slopes, None, cu_seqlens)[0]

    results = run(lambda q, k, v: quadratic_attention(q, k, v, slopes, cu_seqlens, backend), tensors)
    truths = run(expected, [x.double() for x in tensors])
    errors = {
        name: relative_error(*pair)
        for name, *pair in zip(("o", "dq", "dk", "dv"), results, truths, strict=True)
    }
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("N", "Dk", "Dv"), [(1, 16, 24), (31, 24, 16), (32, 8, 64), (100, 64, 32), (130, 128, 96), (70, 16, 256)]
)
def test_outputs_and_gradients(N, Dk, Dv, backend):
    check(N, Dk, Dv, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bounds", [[0, 0, 1, 40, 41, 41, 90, 90], [0, 16, 32, 90]])
def test_packed_sequences(bounds, backend):
    check(90, 16, 24, backend, bounds)


def test_fp64_stays_fp64():
    check(70, 16, 24, "torch", [0, 30, 70], dtype=torch.float64, tolerance=1e-14)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 9, 2, 12)}, "q has head dim 12; allowed: multiples of 8"),
        ({"v": torch.zeros(1, 8, 2, 16)}, "v has shape (1, 8, 2, 16); allowed: q's, (1, 9, 2, 16)"),
        ({"slopes": torch.tensor([-1.0, 0.5])}, "slopes holds"),
        ({"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}, "cu_seqlens goes from 0 to 8"),
        ({"backend": "reference"}, "backend is 'reference'; allowed: auto, triton, torch."),
    ],
)
def test_wrong_arguments_are_named(changes, message, backend):
    x = torch.zeros(1, 9, 2, 16)
    arguments = {"q": x, "k": x, "v": x, "slopes": torch.ones(2), "backend": backend} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        quadratic_attention(**arguments)


def test_batches():
    check(50, 16, 32, "triton", B=2)


def test_slices_of_a_fused_projection():
    tensors, slopes = make_inputs(2, 40, 4, 16, 16)
    fused = torch.cat([x.flatten(2) for x in tensors[:3]], dim=2)
    q, k, v = (x.unflatten(2, (4, 16)) for x in fused.split(64, dim=2))
    o = quadratic_attention(q, k, v, slopes, backend="triton")
    assert torch.equal(o, quadratic_attention(*tensors[:3], slopes, backend="triton"))


def test_it_takes_the_checks_of_a_custom_op_and_compiles():
    tensors, slopes = make_inputs(1, 40, 2, 16, 16)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32, device=DEVICE)
    operator = torch.ops.lightning_attention.quadratic_forward.default
    for bounds in (None, cu_seqlens):
        torch.library.opcheck(operator, (q, k, v, slopes, bounds))


def test_wrong_arguments_are_refused():
    tensors, slopes = make_inputs(1, 8, 2, 16, 16)
    with pytest.raises(ValueError, match="backend is 'reference'; allowed: auto, triton, torch"):
        quadratic_attention(*tensors[:3], slopes, backend="reference")
    with pytest.raises(ValueError, match=r"q has dtype torch\.float64; allowed with backend='triton'"):
        quadratic_attention(*(x.double() for x in tensors[:3]), slopes, backend="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter; on a GPU see below")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_under_the_interpreter(dtype):
    check(40, 16, 24, "triton", dtype=dtype, tolerance=4e-3 if dtype == torch.bfloat16 else 6e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "Dk", "Dv"), [(1000, 128, 128), (515, 256, 128), (700, 64, 64)])
def test_16_bit_on_a_gpu(N, Dk, Dv, dtype):
    check(N, Dk, Dv, "auto", dtype=dtype, tolerance=4e-3 if dtype == torch.bfloat16 else 6e-4)
    check(N, Dk, Dv, "auto", [0, 3, 200, N], dtype=dtype, tolerance=4e-3 if dtype == torch.bfloat16 else 6e-4)
