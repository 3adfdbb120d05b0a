"""The operator's contract: checks and their texts, custom-op registration, torch.compile, imports."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import default_backend, lightning_attention, lightning_attention_step
from kernels.launch import force
from kernels.lightning_attention import _backward, _forward, _step
from kernels.quadratic import quadratic_attention

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(B=2, N=20, H=2, Dk=16, Dv=24):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(B, N, H, Dk), (B, N, H, Dk), (B, N, H, Dv), (B, H, Dk, Dv)]
    tensors = [torch.randn(s, device=DEVICE, generator=generator) for s in shapes]
    return *tensors, torch.linspace(0.0, 0.5, H, device=DEVICE)


# what is wrong, and the words that the message must hold
BAD_INPUTS = {
    "no tensor": ({"v": None}, ["v is a NoneType", "a tensor"]),
    "slopes in a list": ({"slopes": [0.1, 0.2]}, ["slopes is a list", "a tensor"]),
    "state in a list": ({"initial_state": [0.0]}, ["initial_state is a list", "a tensor"]),
    "bounds in a list": ({"cu_seqlens": [0, 20]}, ["cu_seqlens is a list", "a tensor"]),
    "q of three dims": ({"q": torch.zeros(2, 20, 16)}, ["q has shape (2, 20, 16)", "(B, N, H, D)"]),
    "no tokens": ({"q": torch.zeros(2, 0, 2, 16)}, ["q has shape (2, 0, 2, 16)", "no size 0"]),
    "head dim of 12": ({"q": torch.zeros(2, 20, 2, 12)}, ["q has head dim 12", "multiples of 8 up to 256"]),
    "head dim of 264": ({"v": torch.zeros(2, 20, 2, 264)}, ["v has head dim 264", "up to 256"]),
    "integers": (
        {"q": torch.zeros(2, 20, 2, 16, dtype=torch.int64)},
        ["q has dtype torch.int64", "bfloat16"],
    ),
    "two dtypes": ({"k": torch.zeros(2, 20, 2, 16).half()}, ["k is torch.float16", "q is torch.float32"]),
    "k unlike q": ({"k": torch.zeros(2, 20, 2, 24)}, ["k has shape (2, 20, 2, 24)", "(2, 20, 2, 16)"]),
    "v unlike q": ({"v": torch.zeros(2, 21, 2, 24)}, ["v has shape (2, 21, 2, 24)"]),
    "slopes of other heads": ({"slopes": torch.zeros(3)}, ["slopes is torch.float32 (3,)", "(2,)"]),
    "slopes in bf16": ({"slopes": torch.zeros(2).bfloat16()}, ["slopes is torch.bfloat16", "float32"]),
    "slopes with gradient": ({"slopes": torch.zeros(2).requires_grad_()}, ["slopes requires a gradient"]),
    "state of another shape": (
        {"initial_state": torch.zeros(2, 2, 24, 16)},
        ["initial_state is torch.float32 (2, 2, 24, 16)", "(2, 2, 16, 24)"],
    ),
    "state in bf16": (
        {"initial_state": torch.zeros(2, 2, 16, 24).bfloat16()},
        ["initial_state is torch.bfloat16", "torch.float32"],
    ),
    "packed batch": (
        {"cu_seqlens": torch.tensor([0, 20], dtype=torch.int32)},
        ["cu_seqlens needs B = 1", "B = 2"],
    ),
    "backend": ({"backend": "cuda"}, ["backend is 'cuda'", "auto, triton, torch, reference"]),
}
BAD_VALUES = {  # read on the CPU only: on a GPU the check would wait for the device
    "negative slope": ({"slopes": torch.tensor([0.5, -0.25])}, ["slopes holds [0.5, -0.25]", ">= 0"]),
    "slope not a number": ({"slopes": torch.tensor([0.5, float("nan")])}, ["slopes holds [0.5, nan]"]),
}
BAD_PACKING = {
    "int64": (torch.tensor([0, 20]), ["cu_seqlens is torch.int64 (2,)", "int32 (num_sequences + 1,)"]),
    "one bound": (torch.tensor([0], dtype=torch.int32), ["cu_seqlens is torch.int32 (1,)"]),
    "short": (torch.tensor([0, 19], dtype=torch.int32), ["from 0 to 19", "N = 20"]),
    "late": (torch.tensor([1, 20], dtype=torch.int32), ["from 1 to 20"]),
    "falling": (torch.tensor([0, 12, 8, 20], dtype=torch.int32), ["never falling"]),
}


@pytest.mark.parametrize("name", [*BAD_INPUTS, *([] if DEVICE == "cuda" else BAD_VALUES)])
def test_bad_input_is_named(name):
    q, k, v, state, slopes = make()
    changes, words = (BAD_INPUTS | BAD_VALUES)[name]
    changes = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in changes.items()}
    with pytest.raises(ValueError) as error:
        lightning_attention(**({"q": q, "k": k, "v": v, "slopes": slopes, "initial_state": state} | changes))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.skipif(DEVICE == "cuda", reason="values are read on the CPU only")
@pytest.mark.parametrize("name", BAD_PACKING)
def test_bad_packing_is_named(name):
    q, k, v, _, slopes = make(B=1)
    cu_seqlens, words = BAD_PACKING[name]
    with pytest.raises(ValueError) as error:
        lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_input_of_a_step_is_named():
    q, k, v, state, slopes = make()
    with pytest.raises(ValueError, match=r"q has shape \(2, 20, 2, 16\); allowed: \(B, H, D\)"):
        lightning_attention_step(q, k, v, slopes, state)
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    with pytest.raises(ValueError, match=r"state is torch.float32 \(1, 2, 16, 24\)"):
        lightning_attention_step(q, k, v, slopes, state[:1])
    with pytest.raises(ValueError, match="state is None"):
        lightning_attention_step(q, k, v, slopes, None)


def test_triton_without_a_gpu_is_refused(monkeypatch):
    q, k, v, _, slopes = (x.cpu() for x in make())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs a CUDA device and q is on cpu"):
        lightning_attention(q, k, v, slopes, backend="triton")


def test_fake_tensors_are_traced_without_their_values():
    with FakeTensorMode() as mode:
        q, slopes, bounds = (
            mode.from_tensor(x)
            for x in (torch.zeros(1, 5, 2, 8), torch.ones(2), torch.tensor([0, 5], dtype=torch.int32))
        )
        o, state = lightning_attention(q, q, q, slopes, None, True, bounds)
    assert (o.shape, state.shape) == ((1, 5, 2, 8), (1, 2, 8, 8))


def test_sparse_input_is_refused():
    q = torch.zeros(1, 5, 2, 8)
    with pytest.raises(ValueError, match=r"k has layout torch.sparse_coo; allowed: torch.strided"):
        lightning_attention(q, q.to_sparse(), q, torch.ones(2))


def test_backend_and_state_by_default():
    q, k, v, state, slopes = make()
    assert default_backend("cuda") == "triton"
    assert default_backend(torch.device("cpu")) == "torch"
    o, final = lightning_attention(q, k, v, slopes, state)
    assert o.shape == v.shape
    assert final is None


@pytest.mark.parametrize(
    ("backend", "segments", "packed"),
    [("torch", 1, False), ("torch", 1, True), ("triton", 1, True), ("triton", 2, False), ("triton", 2, True)],
)
def test_opcheck(backend, segments, packed):
    q, k, v, state, slopes = make(B=1, H=1)
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE) if packed else None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with force(segments=segments, chunk=16):
        torch.library.opcheck(_forward, (*inputs, slopes, state.requires_grad_(), True, cu_seqlens, backend))
        torch.library.opcheck(_forward, (*inputs, slopes, None, False, cu_seqlens, backend))
        with torch.no_grad():
            _, _, states = _forward(q, k, v, slopes, state, True, cu_seqlens, backend)
        arguments = [x.detach() for x in (q, k, v, slopes, state)]
        grads = (states, torch.randn_like(v), torch.randn_like(state))
        torch.library.opcheck(_backward, (*arguments, cu_seqlens, *grads, backend))


def test_opcheck_of_a_step():
    q, k, v, state, slopes = make()
    torch.library.opcheck(_step, (q[:, 0], k[:, 0], v[:, 0], slopes, state))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_into_one_graph(backend):
    q, k, v, state, slopes = make()

    def loss(q, k, v, state):
        o, final = lightning_attention(q * 2, k, v, slopes, state, True, backend=backend)
        return (o.sin().sum() + final.cos().sum()) * 3

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)):
        inputs = [x.detach().requires_grad_() for x in (q, k, v, state)]
        value = function(*inputs)
        results.append([value, *torch.autograd.grad(value, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_step_compiles_into_one_graph():
    q, k, v, state, slopes = make()
    arguments = (q[:, 0], k[:, 0], v[:, 0], slopes, state)
    step = torch.compile(lightning_attention_step, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(*arguments), lightning_attention_step(*arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_kernels_is_ours_beside_transformers_and_works_without_triton():
    """There is a package of that name on PyPI, which transformers looks for."""
    code = (
        "import sys, torch, kernels, transformers; assert 'triton' not in sys.modules\n"
        "sys.modules['triton'] = None; q = torch.ones(1, 9, 1, 8)\n"
        "kernels.lightning_attention(q, q, q, torch.zeros(1), backend='torch'); del sys.modules['triton']\n"
        "from transformers import PreTrainedModel; print(kernels.__file__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), result.stderr


def test_the_package_named_kernels_on_pypi_is_not_installed():
    assert all(d.metadata["Name"].lower() != "kernels" for d in metadata.distributions())
    for file in ROOT.glob("requirements*.txt"):
        names = [line.split("=")[0].strip().lower() for line in file.read_text().splitlines()]
        assert "kernels" not in names, file.name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_slopes_and_bounds_may_have_any_stride(backend):
    q, k, v, state, slopes = make(B=1, H=3)
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32, device=DEVICE)
    strided = [x.repeat_interleave(2)[::2] for x in (slopes, cu_seqlens)]
    assert not any(x.is_contiguous() for x in strided)

    def outputs(slopes, cu_seqlens):
        packed = {"cu_seqlens": cu_seqlens, "backend": backend}
        o, final = lightning_attention(q, k, v, slopes, output_final_state=True, **packed)
        without_states, _ = lightning_attention(q, k, v, slopes, **packed)
        step = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], slopes, state)
        return [o, final, without_states, quadratic_attention(q, k, v, slopes, **packed), *step]

    for a, b in zip(outputs(slopes, cu_seqlens), outputs(*strided), strict=True):
        assert torch.equal(a, b)
