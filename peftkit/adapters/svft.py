"""SVFT: a sparse trained matrix between the singular vectors of the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import MADE_OF_BASE, Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.frame import frame, orthonormal
from peftkit.adapters.options import factory, misplaced, require
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.delta.base import WeightCache
from peftkit.geometry import Shape
from peftkit.kernels.blocks import upcast


@register("svft")
class SVFT(Adapter):
    r"""Adds a sparse matrix between all singular vectors of the base: ΔW = U·M·Vᵀ, with W = U·S·Vᵀ.

    The parameter is `entries`, the k numbers of M (r, r) that are not 0, r = min(m, n), which start at 0; `indices`
    (2, k) says where they are. U (m, r) and Vᵀ (r, n) are computed from W and frozen. Every pattern has as many numbers
    as a band of 2b + 1 diagonals, k = r·(2b + 1) − b·(b + 1) with b = `off_diag`. A forward costs as much as two more
    layers: route="dense" is the faster one.

    The released code starts M at kaiming_normal times a trained gate of ½, which is not 0; it draws the places of
    "random" with repetition, and takes the largest entries of U·V, not of Uᵀ·V, for "top".

    Paper: https://arxiv.org/abs/2405.19597.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), of which the singular vectors are taken.
        pattern: "banded", which is the paper's plain SVFT with off_diag=0; "random", places drawn by `seed`; or "top",
            where |uᵢᵀvⱼ| is largest, for weights with m = n.
        off_diag: b, below min(m, n).
        seed: Of the places of "random".

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "svft", off_diag=1)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # three diagonals of 8×8
        22
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.19597"
    facts: ClassVar[Facts] = Facts(
        "factors of the base", "U·M·Vᵀ, M sparse", "SVDiff is too little, and its directions should mix"
    )
    convention: ClassVar[str] = "U@M@V, M[indices]=entries"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"entries"})
    on_another_base: ClassVar[str] = MADE_OF_BASE.format("singular vectors")
    decays = frozenset({"entries"})
    left: Tensor
    right: Tensor
    indices: Tensor

    def __init__(
        self, shape: Shape, weight: Tensor, *, pattern: str = "banded", off_diag: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        size = min(shape.rows, shape.columns)
        require(pattern in ("banded", "random", "top"), "svft", "pattern", pattern, "'banded', 'random' or 'top'")
        fits = pattern != "top" or shape.rows == shape.columns
        require(fits, "svft", "pattern", pattern, f"another: the singular vectors of {shape} differ in length")
        require(0 <= off_diag < size, "svft", "off_diag", off_diag, f"0 to {size - 1}, the off-diagonals of {shape}")
        left, _, right = frame(weight)
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        count = size * (2 * off_diag + 1) - off_diag * (off_diag + 1)
        if pattern == "top":
            places = (left.mT @ right.mT).abs().flatten().topk(count).indices
        elif pattern == "random":
            places = torch.randperm(size * size, generator=torch.Generator().manual_seed(seed), device="cpu")[:count]
        else:
            i, j = torch.arange(size, device="cpu")[:, None], torch.arange(size, device="cpu")
            places = ((i - j).abs() <= off_diag).flatten().nonzero()[:, 0]
        indices = torch.stack((places // size, places % size)).to(weight.device)
        self.register_buffer("indices", indices, persistent=pattern != "banded")
        self.entries = nn.Parameter(torch.zeros(count, **factory(weight)))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        M = self.left.new_zeros(len(self.right), len(self.right)).index_put(tuple(self.indices), self.entries)
        return LowRank(self.left @ M, self.right)

    def inner_and_sqnorm(self, weight: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        left, right, entries = map(upcast, (self.left, self.right, self.entries))
        if not cache("orthonormal", lambda: orthonormal(left, right)):
            return super().inner_and_sqnorm(weight, cache)
        # Σ M ⊙ (Uᵀ·W·V), on its own base Σ M_ii·S_i, and ‖M‖²
        seen = cache("seen", lambda: (left.mT @ LowRank(left, right).projected(weight))[tuple(self.indices)])
        return torch.dot(entries, seen), torch.dot(entries, entries)

    def refused(self, tensors: Mapping[str, Tensor]) -> str:
        return misplaced(tensors["indices"], len(self.right), len(self.right)) if "indices" in tensors else ""

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        left, _, right = frame(weight)
        self.left.copy_(left)
        self.right.copy_(right)

    def derived(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}
