"""LoLDU: train the pivots of an LDU factorisation of the base weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import MADE_OF_BASE, Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, limited_rank, rank_scale, require
from peftkit.adapters.registry import register
from peftkit.delta import DiagonalLowRank, LowRank
from peftkit.errors import OptionError
from peftkit.geometry import Shape
from peftkit.kernels.ldu import Pivoting, factor, pivot

#: the rank where none is given, and W has as many pivots
_RANK = 16

INITS = ("lu", "uniform", "s_uniform", "normal", "s_normal", "constant", "zeros", "ones")


@register("loldu")
class LoLDU(Adapter):
    r"""Trains pivots of the base's LDU factors: ΔW = P·L_r·diag(σ·z − σ0·z0)·U_r with W = P·L·D·U.

    Of the first r pivots z (r,) is trained from z0, and σ from σ0 = α/r: at most r + 1 parameters. ΔW is exactly zero
    at the start under every `init`, and the base is never written. L (m, r) is unit lower trapezoidal, U (r, n) unit
    upper, neither orthogonal. Parameters are the offsets `shift`, z − z0 (r,), and `scale_shift`, σ − σ0 (1,), with
    the gradients of z and σ and with no digits lost to z0 and σ0. The order of elimination is stored, so the factors
    come back the same on a base rounded to another dtype.

    Paper: https://arxiv.org/abs/2410.13618.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), which is factored.
        rank: r, at most min(m, n); by default 16, or min(m, n) where that is less.
        alpha: α, by default the rank; not 0.
        init: z0, in the names of the released code (Table V of the paper): "lu" takes the pivots themselves;
            "constant", "uniform" (default) and "normal" go by the mean of the pivots (and their spread); "s_uniform" is
            U(−1, 1), "s_normal" N(0, 1); "zeros"; "ones".
        train_scale: Train σ too, True by default.
        epsilon: The bound on ‖ΔW‖_F that `project_` restores, None for no bound.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "loldu", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # r + 1
        5
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.13618"
    facts: ClassVar[Facts] = Facts(
        "factors of the base", "P·L·diag(σ·z − σ₀·z₀)·U", "a few hundred numbers a layer must do, on one known base"
    )
    convention: ClassVar[str] = "P@L*(sigma*z-sigma0*z0)@U"
    on_another_base: ClassVar[str] = MADE_OF_BASE.format("LDU factors")

    decays = frozenset({"shift"})

    scale_shift: Tensor
    start: Tensor
    order: Tensor
    dead: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        init: str = "uniform",
        train_scale: bool = True,
        epsilon: float | None = None,
    ) -> None:
        super().__init__()
        limit = min(shape.rows, shape.columns)
        rank = limited_rank("loldu", rank, _RANK, limit, f"the number of pivots of this {shape} weight")
        self.options = {"rank": rank}
        require(init in INITS, "loldu", "init", init, f"one of {', '.join(INITS)}")
        require(epsilon is None or epsilon > 0, "loldu", "epsilon", epsilon, "a positive bound on ‖ΔW‖, or None")
        self.start_scale = rank_scale("loldu", rank, alpha)
        require(self.start_scale != 0, "loldu", "alpha", alpha, "a number other than 0, because σ starts at α/r")
        self.epsilon, self.projects = epsilon, epsilon is not None
        new = factory(weight)
        pivoting = pivot(weight, rank)
        left, pivots, right = factor(weight, pivoting)
        self.register_buffer("order", pivoting.order)
        self.register_buffer("dead", pivoting.dead)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.register_buffer("start", _start(init, pivots))
        self.shift = nn.Parameter(torch.zeros(rank, **new))
        scale_shift = torch.zeros(1, **new)  # FSDP2 takes no 0-d parameters
        if train_scale:
            self.scale_shift = nn.Parameter(scale_shift)
        else:
            self.register_buffer("scale_shift", scale_shift)

    def pivot_change(self) -> Tensor:
        """Return δ = σ·z − σ0·z0 = σ·(z − z0) + (σ − σ0)·z0, (r,)."""
        scale_shift = self.scale_shift
        return torch.addcmul((self.start_scale + scale_shift) * self.shift, scale_shift, self.start)

    def delta(self, weight: Tensor) -> DiagonalLowRank:
        del weight
        change = self.pivot_change()
        return DiagonalLowRank(self.left * change, self.right, self.left, change)

    @torch.no_grad()
    def project_(self) -> None:
        """Shorten ΔW to the bound: δ ← δ·min(1, epsilon/‖ΔW‖_F). Without epsilon nothing is done."""
        if self.epsilon is None:
            return
        left, right = self.left.double(), self.right.double()
        norm = LowRank(left * self.pivot_change(), right).sqnorm().clamp(min=0).sqrt().item()
        if norm <= self.epsilon:
            return
        # τ ← c·τ and (z − z0) ← c·(z − z0)·σ/σ' scale δ by c and subtract nothing
        c = self.epsilon / norm
        before, after = self.start_scale + self.scale_shift, self.start_scale + c * self.scale_shift
        if abs(after.item()) < 1e-3 * abs(self.start_scale):  # σ' cannot carry z: let z alone carry δ
            self.shift.copy_(c * self.pivot_change() / self.start_scale)
            self.scale_shift.zero_()
            return
        self.shift.mul_(c * before / after)
        self.scale_shift.mul_(c)

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        rows = weight.shape[0]
        if sorted(self.order.tolist()) != list(range(rows)):
            raise OptionError(f"loldu: the stored order of elimination is not one of {rows} rows")
        left, _, right = factor(weight, Pivoting(self.order, self.dead))
        self.left.copy_(left)
        self.right.copy_(right)

    def derived(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


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
