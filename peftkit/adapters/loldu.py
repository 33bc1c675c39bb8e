"""LoLDU: train the pivots of an LDU factorisation of the base weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapter import Adapter, factory, rank_scale, require, require_rank
from peftkit.delta import LowRank
from peftkit.delta.base import accumulation_dtype
from peftkit.errors import OptionError
from peftkit.geometry import Shape
from peftkit.registry import register

INITS = ("lu", "uniform", "s_uniform", "normal", "s_normal", "constant", "zeros", "ones")

# A pivot smaller than this, relative to its row, is replaced by the row's largest entry: U' stays below 1000
_SMALL_PIVOT = 1e-3


@register("loldu")
class LoLDU(Adapter):
    r"""ΔW = P·L_r·diag(σ·z − σ0·z0)·U_r, with W = P·L·D·U and the first r pivots; at most r + 1 parameters.

    z (r,) starts at z0, σ at σ0 = α/r, so ΔW is exactly zero at the start under every `init`; the base is never
    written. σ is trained with `train_scale`. L (m, r) is unit lower trapezoidal, U (r, n) unit upper, neither
    orthogonal. init: the start z0, in the names of the released code, for Table V of the paper: "lu" the pivots
    themselves; "constant", "uniform", "normal" by their mean (and spread); "s_uniform" U(−1, 1), "s_normal" N(0, 1),
    "zeros", "ones". epsilon: the bound on ‖ΔW‖_F that `project_` restores exactly.

    The permutation is stored, so the factors come back the same on a base rounded to another dtype.

    Paper: https://arxiv.org/abs/2410.13618.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.13618"
    convention: ClassVar[str] = "P@L*(sigma*z-sigma0*z0)@U"
    on_another_base: ClassVar[str] = (
        "is made of the first base's own LDU factors, which this file does not hold: save it with portable=True"
    )

    diag: Tensor
    sigma: Tensor
    start: Tensor
    permutation: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 16,
        alpha: float | None = None,
        init: str = "uniform",
        train_scale: bool = True,
        epsilon: float | None = None,
    ) -> None:
        super().__init__()
        require_rank("loldu", rank)
        limit = min(shape.rows, shape.columns)
        require(rank <= limit, "loldu", "rank", rank, f"at most {limit}, the number of pivots of this {shape} weight")
        require(init in INITS, "loldu", "init", init, f"one of {', '.join(INITS)}")
        require(epsilon is None or epsilon > 0, "loldu", "epsilon", epsilon, "a positive bound on ‖ΔW‖, or None")
        self.start_scale = rank_scale("loldu", rank, alpha)
        require(self.start_scale != 0, "loldu", "alpha", alpha, "a number other than 0, because σ starts at α/r")
        self.epsilon = epsilon
        new = factory(weight)
        permutation = pivot_order(weight, rank)
        left, pivots, right = ldu(weight, permutation, rank)
        start = _start(init, pivots)
        self.register_buffer("permutation", permutation)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.register_buffer("start", start)
        self.diag = nn.Parameter(start.clone())
        sigma = torch.full((), self.start_scale, **new)
        if train_scale:
            self.sigma = nn.Parameter(sigma)
        else:
            self.register_buffer("sigma", sigma)

    def pivot_change(self) -> Tensor:
        """δ = σ·z − σ0·z0, (r,), written so that it is exactly zero at the start even if contracted to an fma."""
        return self.sigma * (self.diag - self.start) + (self.sigma - self.start_scale) * self.start

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(self.left * self.pivot_change(), self.right)

    @torch.no_grad()
    def project_(self, weight: Tensor) -> None:
        """z ← the nearest along δ with ‖ΔW‖_F ≤ epsilon; a no-op without epsilon or inside the ball."""
        if self.epsilon is None:
            return
        norm = self.delta(weight).sqnorm().clamp(min=0).sqrt()
        if norm <= self.epsilon:
            return
        change = self.pivot_change() * (self.epsilon / norm)
        if self.sigma.abs() < 1e-6 * abs(self.start_scale):  # z cannot carry δ through a vanished σ
            self.sigma.fill_(self.start_scale)
        self.diag.copy_((change + self.start_scale * self.start) / self.sigma)

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        rows = weight.shape[0]
        if sorted(self.permutation.tolist()) != list(range(rows)):
            raise OptionError(f"loldu: the stored permutation is not one of {rows} rows")
        left, _, right = ldu(weight, self.permutation, len(self.start))
        self.left.copy_(left)
        self.right.copy_(right)

    def derived(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


def pivot_order(weight: Tensor, rank: int) -> Tensor:
    """The order in which partial pivoting takes the rows of W (m, n): (m,) int32, the first `rank` chosen.

    Pivots are chosen column by column, so those of the first `rank` columns alone are those of the whole matrix.
    """
    panel = weight[:, :rank].to(accumulation_dtype(weight.dtype))
    swaps = torch.linalg.lu_factor_ex(panel).pivots
    order = list(range(weight.shape[0]))
    for i, j in enumerate([] if swaps.is_meta else swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order, dtype=torch.int32, device=weight.device)


def ldu(weight: Tensor, order: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P·L (m, rank), pivots (rank,) and U (rank, n) of W = P·L·D·U, in O(rank²·(m + n)).

    weight (m, n); order (m,) from `pivot_order`: row i of L·D·U is W[order[i]].
    A pivot that is zero, or tiny beside its row, gives way to the row's largest entry: U stays bounded and
    P·L·diag(pivots)·U is W all the same.
    """
    order = order.long()
    lower = _unit_lower(weight[order, :rank].to(accumulation_dtype(weight.dtype)))
    top = weight[order[:rank]].to(lower.dtype)
    upper = torch.linalg.solve_triangular(lower[:rank], top, upper=False, unitriangular=True)
    pivots, largest = upper.diagonal().clone(), upper.abs().amax(1)
    pivots = torch.where(pivots.abs() > _SMALL_PIVOT * largest, pivots, largest)
    unit = torch.eye(rank, weight.shape[1], dtype=upper.dtype, device=upper.device)
    upper = torch.where((largest > 0)[:, None], upper / pivots.where(pivots != 0, 1.0)[:, None], unit)
    return torch.zeros_like(lower).index_copy(0, order, lower), pivots, upper


def _unit_lower(panel: Tensor) -> Tensor:
    """L of panel = L·U without pivoting, by halves. panel (m, r), m ≥ r -> (m, r) unit lower trapezoidal."""
    rank = panel.shape[1]
    if rank == 1:
        pivot = panel[0, 0]
        lower = torch.where(pivot == 0, torch.zeros_like(panel), panel / pivot)
        lower[0] = 1
        return lower
    half = rank // 2
    lower = torch.zeros_like(panel)
    lower[:, :half] = _unit_lower(panel[:, :half])
    corner = torch.linalg.solve_triangular(lower[:half, :half], panel[:half, half:], upper=False, unitriangular=True)
    lower[half:, half:] = _unit_lower(panel[half:, half:] - lower[half:, :half] @ corner)
    return lower


def _start(init: str, pivots: Tensor) -> Tensor:
    """z0 (r,) for each init of the paper's Table V."""
    mean = pivots.mean()
    if init == "lu":
        return pivots.clone()
    if init == "uniform":
        return (torch.rand_like(pivots) - 0.5) * mean
    if init == "s_uniform":
        return torch.rand_like(pivots) * 2 - 1
    if init == "normal":
        return mean + torch.randn_like(pivots) * pivots.std(correction=0)
    if init == "s_normal":
        return torch.randn_like(pivots)
    if init == "constant":
        return mean.expand_as(pivots).clone()
    return torch.zeros_like(pivots) if init == "zeros" else torch.ones_like(pivots)
