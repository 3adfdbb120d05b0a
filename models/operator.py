"""The operators of an exported model, which must also run where this repository is absent.

They are those of our `kernels` package where that can be imported, Triton and all. Elsewhere (PyPI has
another package of that name, which lacks them) they are PyTorch: attention in its chunked form.
Only models/standalone.py uses this file: `models/attention.py` takes its operator straight from `kernels`.
"""

from __future__ import annotations

from torch import Tensor

from kernels.reference import chunked, per_sequence, recurrent
from kernels.torch_cross_entropy import torch_cross_entropy
from kernels.torch_quadratic import torch_quadratic_attention

try:
    from kernels import lightning_attention, lightning_attention_step
    from kernels.cross_entropy import cross_entropy
    from kernels.quadratic import quadratic_attention
except ImportError:
    cross_entropy = torch_cross_entropy

    def quadratic_attention(*inputs, backend: str = "auto") -> Tensor:  # type: ignore[misc]
        """torch_quadratic_attention, which is the only backend here."""
        return torch_quadratic_attention(*inputs)

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
        """q, k (B, N, H, Dk), v (B, N, H, Dv) → o (B, N, H, Dv) and the final state or None."""
        if cu_seqlens is None:
            o, state = chunked(q, k, v, slopes, initial_state)
        else:
            o, state = per_sequence(chunked, q, k, v, slopes, initial_state, cu_seqlens)
        return o, state if output_final_state else None

    def lightning_attention_step(
        q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token: q, k (B, H, Dk), v (B, H, Dv), state (B, H, Dk, Dv) → o (B, H, Dv), next state."""
        o, state = recurrent(q[:, None], k[:, None], v[:, None], slopes, state)
        return o[:, 0], state
