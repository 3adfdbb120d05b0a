"""What the kernels' benchmark compares: ours and every installed peer, and whether each of them is right.

A peer is imported on first use and left out where that fails. Errors are relative, against float64.

Shapes: q, k (B, N, H, Dk); v, o (B, N, H, Dv); slopes (H,); state (B, H, Dk, Dv). A step takes one token of
each sequence, q, k (B, H, Dk) and v (B, H, Dv), and the state before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import lightning_attention, lightning_attention_step, reference

Shape = tuple[int, int, int, int, int]  # B, N, H, Dk, Dv
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative error that no rounding of a right result explains.
TOLERANCES = {"bf16": 5e-3, "fp16": 2e-3, "fp32": 1e-3}


@dataclass(frozen=True)
class Provider:
    """Something that computes attention from q, k, v, slopes, and cu_seqlens where it is `general`."""

    name: str
    run: Callable[..., Tensor]
    general: bool = False  # takes any head dims, packed documents too
    heads_first: bool = False  # takes (B, H, N, D) instead of (B, N, H, D)
    softmax: bool = False  # causal softmax attention: another function, and quadratic in N
    quadratic: bool = False

    def attention(self, slopes: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The function from q, k, v, in this provider's layout, to o."""
        return lambda q, k, v: self.run(q, k, v, slopes)

    def in_layout(self, tensors: list[Tensor]) -> list[Tensor]:
        """Contiguous copies in the provider's layout, so that no copy is timed."""
        return [x.transpose(1, 2).contiguous() for x in tensors] if self.heads_first else tensors


def installed_providers(device: str) -> list[Provider]:
    """Ours first, then the peers found on this machine; on a CPU the quadratic reference."""
    providers = [Provider("ours", ours, general=True)]
    if device == "cpu":
        return [*providers, Provider("quadratic", partial(_first, reference.quadratic), quadratic=True)]
    for name in ("chunk_simple_gla", "fused_chunk_simple_gla"):
        if function := _peer("fla.ops.simple_gla", name):
            providers.append(Provider(f"fla {name}", partial(_simple_gla, function), general=True))
    if function := _peer("lightning_attn.ops", "lightning_attn_func"):
        providers.append(Provider("lightning_attn", partial(_lightning_attn, function), heads_first=True))
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        run = partial(_softmax, backend)
        providers.append(Provider(f"sdpa {name}", run, heads_first=True, softmax=True, quadratic=True))
    return providers


def installed_steps() -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """Functions of one token by name: from q, k, v, slopes and the state to o and the next state."""
    steps: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"ours": lightning_attention_step}
    if function := _peer("fla.ops.simple_gla", "fused_recurrent_simple_gla"):
        steps["fla fused_recurrent_simple_gla"] = partial(_simple_gla_step, function)
    return steps


@cache
def _peer(module: str, name: str) -> Callable | None:
    """A peer's function, or None where the package is missing or does not import here."""
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a peer may fail in any way on a version it was not made for
        print(f"not compared: {module}.{name} ({_in_a_line(error)})")
        return None


def _in_a_line(error: Exception) -> str:
    """The kind of an error and the start of what it says."""
    return f"{type(error).__name__}: {str(error)[:80]}".splitlines()[0]


def ours(q, k, v, slopes, cu_seqlens=None):
    return lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens)[0]


def _first(form, q, k, v, slopes):
    return form(q, k, v, slopes)[0]


def _simple_gla(function, q, k, v, slopes, cu_seqlens=None):
    return function(q, k, v, g_gamma=-slopes, scale=1.0, cu_seqlens=cu_seqlens)[0]


@torch.no_grad()
def _simple_gla_step(function, q, k, v, slopes, state):
    q, k, v = (x[:, None] for x in (q, k, v))
    settings = {"g_gamma": -slopes, "scale": 1.0, "initial_state": state, "output_final_state": True}
    o, after = function(q, k, v, **settings)
    return o[:, 0], after


def _lightning_attn(function, q, k, v, slopes):
    return function(q, k, v, slopes[:, None, None])


def _softmax(backend, q, k, v, slopes):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def packed_providers(providers: list[Provider], cuts: dict[str, list[int]], device: str) -> list[Provider]:
    """Each provider over packed documents, for each way to cut them: where documents begin, and the end."""

    def packed(provider: Provider, cut: str, bounds: list[int]) -> Provider:
        dtype = torch.int32 if provider.run is ours else torch.int64
        cu_seqlens = torch.tensor(bounds, device=device, dtype=dtype)
        return Provider(f"{provider.name}, {cut}", partial(provider.run, cu_seqlens=cu_seqlens))

    return [packed(provider, cut, bounds) for cut, bounds in cuts.items() for provider in providers]


def make_slopes(heads: int, device: str) -> Tensor:
    """2^(-8(h+1)/H), the slopes of a TransNormer layer."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device, dtype=torch.float32) / heads)


def make_tensors(shape: Shape, dtype: str, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of o, (B, N, H, D)."""
    B, N, H, Dk, Dv = shape
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(B, N, H, Dk), (B, N, H, Dk), (B, N, H, Dv), (B, N, H, Dv)]
    return [torch.randn(s, device=device, generator=generator).to(DTYPES[dtype]) for s in shapes]


def make_step_inputs(shape: Shape, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, slopes and state of a step; N is 1."""
    B, _, H, Dk, Dv = shape
    q, k, v, _ = (x[:, 0].contiguous() for x in make_tensors(shape, dtype, device))
    return q, k, v, make_slopes(H, device), torch.randn(B, H, Dk, Dv, device=device)


def forward_and_gradients(attention: Callable[..., Tensor], q, k, v, grad_o) -> list[Tensor]:
    """o, dq, dk and dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = attention(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), grad_o)]


@dataclass(frozen=True)
class Check:
    """What a provider has to get right before it is timed.

    Attributes:
        case: "batch", "packed" or "one_token".
        errors: measures the relative error of each result, by the result's name.
    """

    provider: str
    case: str
    dtype: str
    shape: Shape
    errors: Callable[[], dict[str, float]]

    def run(self) -> dict:
        """The errors, and a `verdict`: "right", "wrong", or how a peer fails. Ours has to work."""
        row = {"provider": self.provider, "case": self.case, "dtype": self.dtype, "shape": list(self.shape)}
        try:
            errors = self.errors()
        except Exception as error:
            if self.provider == "ours":
                raise
            return row | {"verdict": f"fails: {_in_a_line(error)}"}
        right = all(error <= TOLERANCES[self.dtype] for error in errors.values())
        return row | errors | {"verdict": "right" if right else "wrong"}


def batch_errors(provider: Provider, shape: Shape, dtype: str, device: str, seed: int) -> dict[str, float]:
    """Of o, dq, dk and dv, and of the final state for ours, on sequences of one length."""
    tensors = make_tensors(shape, dtype, device, seed)
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
    results = forward_and_gradients(provider.attention(slopes), *provider.in_layout(tensors))
    if provider.heads_first:
        results = [x.transpose(1, 2) for x in results]
    names = ("o", "dq", "dk", "dv")
    errors = {name: _error(x, t) for name, x, t in zip(names, results, truth, strict=True)}
    if provider.name == "ours":
        state, exact_state = (
            lightning_attention(q, k, v, slopes, output_final_state=True, backend=backend)[1]
            for (q, k, v, _), backend in ((tensors, "auto"), (exact, "torch"))
        )
        assert state is not None
        assert exact_state is not None
        errors["state"] = _error(state, exact_state)
    return errors


def packed_errors(provider: Provider, shape: Shape, dtype: str, device: str) -> dict[str, float]:
    """Of o, on three documents packed into the N tokens of one sequence."""
    tensors = make_tensors(shape, dtype, device)[:3]
    slopes, bounds = make_slopes(shape[2], device), [0, 3, 300, shape[1]]
    (packed,) = packed_providers([provider], {"short": bounds}, device)
    cu_seqlens = torch.tensor(bounds, device=device, dtype=torch.int32)
    q, k, v = (x.double() for x in tensors)
    truth = lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens, backend="torch")[0]
    return {"o": _error(packed.run(*tensors, slopes), truth)}


def step_errors(step: Callable, shape: Shape, dtype: str, device: str) -> dict[str, float]:
    """Of o and the next state of a step."""
    q, k, v, slopes, state = make_step_inputs(shape, dtype, device)
    exact_q, exact_k, exact_v = (x[:, None].double() for x in (q, k, v))
    exact_o, exact_state = lightning_attention(
        exact_q, exact_k, exact_v, slopes, state.double(), output_final_state=True, backend="torch"
    )
    assert exact_state is not None
    o, after = step(q, k, v, slopes, state)
    return {"o": _error(o, exact_o[:, 0]), "state": _error(after, exact_state)}


def _error(x: Tensor, truth: Tensor) -> float:
    """‖x - truth‖ / ‖truth‖."""
    return float((x.double() - truth).norm() / truth.norm())
