"""Stacks: ΔW of several experts, one below the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit.delta.base import Delta, WeightCache, total
from peftkit.delta.lowrank import LowRank
from peftkit.errors import ExportError
from peftkit.kernels.cache import cached_without_grad


class StackedDelta(Delta):
    """ΔW (E·m, n) of E experts: rows [e·m, (e+1)·m) are the ΔW (m, n) of expert e. A subclass gives the parts."""

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of experts, E."""

    @property
    @abstractmethod
    def one(self) -> tuple[int, int]:
        """The shape (m, n) of one part."""

    @abstractmethod
    def part(self, expert: int) -> Delta:
        """Return ΔW (m, n) of one expert."""

    @property
    def parts(self) -> tuple[Delta, ...]:
        """ΔW of every expert."""
        return tuple(map(self.part, range(self.count)))

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.one
        return self.count * m, n

    def dense(self) -> Tensor:
        return self.matrices(slice(0, self.count)).flatten(0, 1)

    @property
    def row_multiple(self) -> int:
        unit, m = self.part(0).row_multiple, self.one[0]
        return unit if m % unit == 0 else m

    def rows(self, block: slice) -> Tensor:
        found = [self.part(expert).rows(rows) for expert, rows in self._within(block)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def rows_(self, block: slice, out: Tensor) -> None:
        first = 0
        for expert, rows in self._within(block):
            size = len(range(rows.start, rows.stop, rows.step or 1))
            self.part(expert).rows_(rows, out[first : first + size])
            first += size

    def tile(self, rows: slice, columns: slice) -> Tensor:
        return torch.cat([self.part(expert).tile(own, columns) for expert, own in self._within(rows)])

    def _within(self, block: slice) -> list[tuple[int, slice]]:
        """The experts that some rows are of, each with its own rows among them, which start at 0."""
        m, step = self.one[0], block.step or 1
        found: list[tuple[int, slice]] = []
        row = block.start
        while row < block.stop:
            expert = row // m
            end = min(block.stop, (expert + 1) * m)
            found.append((expert, slice(row - expert * m, end - expert * m, block.step)))
            row += -(-(end - row) // step) * step
        return found

    def inner(self, M: Tensor) -> Tensor:
        own = M.unflatten(0, (self.count, -1))
        return total([part.inner(own[expert]) for expert, part in enumerate(self.parts)])

    def sqnorm(self) -> Tensor:
        return total([part.sqnorm() for part in self.parts])

    @cached_without_grad
    def cheap_sqnorm(self) -> Tensor | None:
        squares = [square for part in self.parts if (square := part.cheap_sqnorm) is not None]
        return total(squares) if len(squares) == self.count else None

    def max_abs_bound(self, max_abs_weight: Tensor) -> Tensor:
        return torch.stack([part.max_abs_bound(max_abs_weight) for part in self.parts]).max()

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        del cache  # it knows one weight, and each expert has its own
        own = W.unflatten(0, (self.count, -1))
        pairs = [part.inner_and_sqnorm(own[expert], WeightCache()) for expert, part in enumerate(self.parts)]
        return total([inner for inner, _ in pairs]), total([square for _, square in pairs])

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        own = M.unflatten(0, (self.count, -1))
        pairs = [part.moments(own[expert]) for expert, part in enumerate(self.parts)]
        return torch.cat([products for products, _ in pairs]), torch.cat([squares for _, squares in pairs])

    def column_moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        own = M.unflatten(0, (self.count, -1))
        pairs = [part.column_moments(own[expert]) for expert, part in enumerate(self.parts)]
        return total([products for products, _ in pairs]), total([squares for _, squares in pairs])

    def dense_flops(self) -> int:
        return self.count * self.part(0).dense_flops()


@dataclass(frozen=True, repr=False, eq=False)
class Stack(StackedDelta):
    """ΔW of several experts, each of any structure.

    Attributes:
        each: ΔW (m, n) of every expert, in order, all of one structure.

    Example:
        >>> parts = tuple(pk.delta.LowRank(torch.ones(3, 2), torch.ones(2, 4)) for _ in range(5))
        >>> pk.delta.Stack(parts).shape
        (15, 4)
    """

    each: tuple[Delta, ...]

    @property
    def count(self) -> int:
        return len(self.each)

    @property
    def one(self) -> tuple[int, int]:
        return self.each[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.each[0].dtype

    @property
    def device(self) -> torch.device:
        return self.each[0].device

    def part(self, expert: int) -> Delta:
        return self.each[expert]

    def matrices(self, experts: slice) -> Tensor:
        return torch.stack([part.dense() for part in self.each[experts]])

    def scaled(self, strength: float | Tensor) -> Stack:
        return Stack(tuple(part.scaled(strength) for part in self.each))

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return tuple(factor for part in self.each for factor in part.factors)

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> Stack:
        return Stack(tuple(part.mapped(function) for part in self.each))

    def upcast(self) -> Delta:
        return Stack(tuple(part.upcast() for part in self.each))

    @property
    def kind(self) -> str:
        return self.each[0].kind

    @property
    def rank(self) -> int | None:
        return self.each[0].rank

    def as_parameters(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        stored = [part.as_parameters() for part in self.each]
        return stored[0][0], {key: torch.stack([own[key] for _, own in stored]) for key in stored[0][1]}

    def __repr__(self) -> str:
        return f"{self.count} × ({self.each[0]!r})"


def stack_of(parts: Sequence[Delta]) -> StackedDelta:
    """Return the ΔW of a stack of experts from that of each; low-rank ones get the largest of their ranks.

    Raises:
        ExportError: the others are not all of one structure and size.
    """
    low = [part for part in parts if isinstance(part, LowRank)]
    if len(low) < len(parts):
        if len({(type(part), *(factor.shape for factor in part.factors)) for part in parts}) > 1:
            raise ExportError("its experts would get ΔW of different structures or ranks, and they share one adapter")
        return Stack(tuple(parts))
    rank = max(part.rank for part in low)
    grown = [(F.pad(part.B, (0, rank - part.rank)), F.pad(part.A, (0, 0, 0, rank - part.rank))) for part in low]
    return LowRankStack(torch.stack([B for B, _ in grown]), torch.stack([A for _, A in grown]))


@dataclass(frozen=True, repr=False, eq=False)
class LowRankStack(StackedDelta):
    """ΔW of several experts, B_e·A_e of each, in one batch.

    Attributes:
        B: (E, m, r).
        A: (E, r, n).

    Example:
        >>> delta = pk.delta.LowRankStack(torch.ones(5, 3, 2), torch.ones(5, 2, 4))
        >>> delta.shape, delta.part(0)
        ((15, 4), B(3×2)·A(2×4))
    """

    structure: ClassVar[str] = "lora"
    factored: ClassVar[bool] = True
    keeps_factors: ClassVar[bool] = True

    B: Tensor
    A: Tensor

    @property
    def count(self) -> int:
        return self.B.shape[0]

    @property
    def one(self) -> tuple[int, int]:
        return self.B.shape[1], self.A.shape[2]

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def part(self, expert: int) -> LowRank:
        return LowRank(self.B[expert], self.A[expert])

    def matrices(self, experts: slice) -> Tensor:
        return self.B[experts] @ self.A[experts]

    @property
    def turned(self) -> LowRankStack:
        """The ΔW of the transposed matrices, (E·n, m)."""
        return LowRankStack(self.A.transpose(-1, -2), self.B.transpose(-1, -2))

    def as_parameters(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"rank": self.rank}, {"up": self.B, "down": self.A}

    def scaled(self, strength: float | Tensor) -> LowRankStack:
        return LowRankStack(self.B * strength, self.A)

    @property
    def row_multiple(self) -> int:
        return 1

    def inner(self, M: Tensor) -> Tensor:
        return (self._projected(M) * self.B).sum()

    def sqnorm(self) -> Tensor:
        return ((self.B.mT @ self.B) * (self.A @ self.A.mT)).sum()

    @cached_without_grad
    def cheap_sqnorm(self) -> Tensor:
        wide = torch.float32 if self.device.type == "mps" else torch.float64  # ranks may cancel
        return LowRankStack(self.B.to(wide), self.A.to(wide)).sqnorm()

    def inner_and_sqnorm(self, W: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        del cache
        return self.inner(W), self.cheap_sqnorm

    def moments(self, M: Tensor) -> tuple[Tensor, Tensor]:
        products = (self._projected(M) * self.B).sum(2)
        return products.flatten(), ((self.B @ (self.A @ self.A.transpose(-1, -2))) * self.B).sum(2).flatten()

    def _projected(self, M: Tensor) -> Tensor:
        """M_e·A_eᵀ (E, m, r), without a copy of M in another dtype. M (E·m, n)."""
        own = M.unflatten(0, (self.count, -1))
        if M.dtype == self.dtype:
            return own @ self.A.transpose(-1, -2)
        return torch.stack([W.to(self.dtype) @ A.t() for W, A in zip(own, self.A, strict=True)])

    def dense_flops(self) -> int:
        return 2 * self.rank * self.shape[0] * self.shape[1]

    def __repr__(self) -> str:
        m, n = self.one
        return f"{self.count} × (B({m}×{self.rank})·A({self.rank}×{n}))"
