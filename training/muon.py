"""Muon for the matrices of the blocks and AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest matrix with equal singular values.
Its update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of AdamW's, so that
one learning rate and one weight decay serve both (Liu et al. 2025, arXiv 2502.16982, eq. 4).

Under ZeRO a rank holds a stretch of the flattened parameters. Momentum is kept for that stretch only; a
matrix that lies on one rank is orthogonalized there, one that is spread over ranks is put together on each
rank in turn. Sums of disjoint parts are exact, so the result does not depend on how matrices are spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Newton–Schulz: x -> a x + (b A + c A²) x with A = x xᵀ, whose slope at 0 is as large as these steps allow
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
UPDATE_RMS = 0.2  # AdamW's updates have about this root mean square
BATCH_ELEMENTS = 2**26  # of matrices that are orthogonalized together
# Weights that hold several maps, one below the other: each is a matrix of its own.
NUM_STACKED = {"qkvu_proj.weight": 4, "qkv_proj.weight": 3}


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """The part of one matrix that lies in a flat tensor of this rank.

    Attributes:
        shape: of the whole matrix.
        offset: of the part in the flat tensor.
        start: first element of the part in the flattened matrix.
        numel: elements of the part; 0 if all of the matrix is elsewhere.
        is_spread: no rank holds the whole matrix.
    """

    shape: tuple[int, int]
    offset: int
    start: int
    numel: int
    is_spread: bool = False

    @property
    def is_whole(self) -> bool:
        return self.numel == self.shape[0] * self.shape[1]


def is_block_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon takes the parameter: 2-D and in a block, neither embedding nor head."""
    return p.ndim == 2 and ".layers." in name


def matrix_parts(name: str, shape: tuple[int, ...], offset: int, start: int, numel: int) -> list[MatrixPart]:
    """The matrices of a parameter whose elements [start, start + numel) lie at `offset` in a flat tensor."""
    count = next((count for suffix, count in NUM_STACKED.items() if name.endswith(suffix)), 1)
    rows, columns = shape[0] // count, shape[1]
    parts = []
    for index in range(count):
        begin = index * rows * columns
        first, last = max(start, begin), min(start + numel, begin + rows * columns)
        length = max(last - first, 0)
        parts.append(
            MatrixPart((rows, columns), offset + first - start, first - begin, length)
            if length
            else MatrixPart((rows, columns), 0, 0, 0)
        )
    return parts


class MuonAdamW(torch.optim.Optimizer):
    """Both optimizers over groups that say by `muon` which of them they are for.

    A parameter may be a flat tensor that holds stretches of several matrices: `parts` says which, in the same
    order on all ranks, and must be filled in for every tensor of a Muon group before the first step.

    Args:
        groups: each with `params`, `weight_decay` and `muon`.
        momentum: Muon's, an exponential mean as AdamW's first moment, with Nesterov's look-ahead.
        betas, eps: AdamW's.
        dtype: of the Newton–Schulz products.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})
        self.dtype = dtype
        self.parts: dict[Tensor, list[MatrixPart]] = {}

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            for p in gradients:
                create_state(self, group, p)
            (self._muon if group["muon"] else self._adamw)(gradients, group)

    def _adamw(self, gradients: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in gradients]
        adamw(
            list(gradients),
            list(gradients.values()),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, gradients: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        updates = []
        whole: list[tuple[MatrixPart, Tensor]] = []
        spread: list[tuple[MatrixPart, Tensor]] = []
        for p, gradient in gradients.items():
            momentum, gradient = self.state[p]["momentum"].view(-1), gradient.view(-1)
            momentum.lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(momentum, group["momentum"]))
            for part in self.parts[p]:
                view = updates[-1].narrow(0, part.offset, part.numel)
                if part.is_spread:
                    spread.append((part, view))
                elif part.is_whole:
                    whole.append((part, view))
        self._orthogonalize_whole(whole)
        if spread:
            self._orthogonalize_spread(spread)
        for p, update in zip(gradients, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.view(-1).sub_(update, alpha=group["lr"])

    def _orthogonalize_whole(self, matrices: list[tuple[MatrixPart, Tensor]]) -> None:
        """In place; matrices of one size, in either orientation, go together."""
        by_shape: dict[tuple[int, ...], list[tuple[MatrixPart, Tensor]]] = {}
        for part, view in matrices:
            by_shape.setdefault(tuple(sorted(part.shape)), []).append((part, view))
        for (short, long), alike in by_shape.items():
            batch = max(1, BATCH_ELEMENTS // (short * long))
            for first in range(0, len(alike), batch):
                views = [_wide(view.view(part.shape)) for part, view in alike[first : first + batch]]
                results = orthogonalize(torch.stack([view.to(self.dtype) for view in views]))
                for view, result in zip(views, results, strict=True):
                    view.copy_(result)

    def _orthogonalize_spread(self, matrices: list[tuple[MatrixPart, Tensor]]) -> None:
        """In place and on all ranks together, in rounds of a matrix for each rank."""
        for first in range(0, len(matrices), dist.get_world_size()):
            in_round = matrices[first : first + dist.get_world_size()]
            mine = torch.empty(0)
            for owner, (part, view) in enumerate(in_round):
                matrix = view.new_zeros(part.shape)
                matrix.view(-1)[part.start : part.start + part.numel] = view
                dist.reduce(matrix, owner)
                if owner == dist.get_rank():
                    _wide(matrix).copy_(orthogonalize(_wide(matrix).to(self.dtype)[None])[0])
                    mine = matrix
            for owner, (part, view) in enumerate(in_round):
                matrix = mine if owner == dist.get_rank() else view.new_empty(part.shape)
                dist.broadcast(matrix, owner)
                view.copy_(matrix.view(-1)[part.start : part.start + part.numel])


def create_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: Tensor) -> None:
    """Give a parameter the zero state that the optimizer of its group starts from, unless it has one."""
    state = optimizer.state[p]
    if state:
        return
    if group.get("muon"):
        state["momentum"] = torch.zeros_like(p)
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)


def _wide(matrix: Tensor) -> Tensor:
    """A view with at least as many columns as rows."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (M, rows <= columns) near to those with equal singular values, scaled to AdamW's updates.

    Five Newton–Schulz iterations bring all singular values to between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    columns = x.shape[-1]
    x = x / x.float().norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7).to(x.dtype)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT  # (M, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x * (UPDATE_RMS * columns**0.5)
