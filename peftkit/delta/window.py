"""Window: some rows of another ΔW, where a weight is changed region by region."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peftkit.delta.base import Delta


@dataclass(frozen=True, repr=False, eq=False)
class Window(Delta):
    """Rows [first, first + size) of another ΔW (m, n): (size, n)."""

    of: Delta
    first: int
    size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.of.shape[1]

    def dense(self) -> Tensor:
        return self.rows(slice(0, self.size))

    def scaled(self, strength: float | Tensor) -> Window:
        return Window(self.of.scaled(strength), self.first, self.size)

    @property
    def row_multiple(self) -> int:
        aligned = self.first % self.of.row_multiple == 0 and self.size % self.of.row_multiple == 0
        return self.of.row_multiple if aligned else self.size

    def rows(self, block: slice) -> Tensor:
        start, stop, unit = self.first + block.start, self.first + block.stop, self.of.row_multiple
        if unit == 1:
            return self.of.rows(slice(start, stop, block.step))
        outer = slice(start // unit * unit, min(-(-stop // unit) * unit, self.of.shape[0]))
        return self.of.rows(outer)[start - outer.start : stop - outer.start]


def window(delta: Delta, first: int, size: int) -> Delta:
    """Return rows [first, first + size) of a ΔW (m, n); the ΔW itself if these are all its rows."""
    return delta if (first, size) == (0, delta.shape[0]) else Window(delta, first, size)
