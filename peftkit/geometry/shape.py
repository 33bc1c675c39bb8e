"""The sizes of the matrix that an adapter adapts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Holds the sizes of the matrix that an adapter adapts, m = `rows` by n = `channels`·∏`kernel`.

    Rows [j·rows/groups, (j+1)·rows/groups) read the j-th run of `channels` input channels. Without a kernel, they
    are the matrix of the j-th of a stack of experts.

    Attributes:
        rows: The output channels, m.
        channels: The input channels that one output reads.
        kernel: The size of the kernel in each dimension; () for Linear.
        groups: The number of bands of rows, each with its own input channels.
    """

    rows: int
    channels: int
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def positions(self) -> int:
        """The kernel positions, ∏`kernel`."""
        return math.prod(self.kernel)

    @property
    def columns(self) -> int:
        """The fan-in of one output, n."""
        return self.channels * self.positions

    @property
    def experts(self) -> int:
        """The matrices of a stack of experts; 1 for any other weight."""
        return 1 if self.kernel else self.groups

    @property
    def one(self) -> Shape:
        """The shape of one expert's matrix."""
        return Shape(self.rows // self.experts, self.channels) if self.experts > 1 else self

    @property
    def turned(self) -> Shape:
        """The shape of the transposed matrices of a stack of experts."""
        return Shape(self.experts * self.columns, self.one.rows, groups=self.experts)

    def __str__(self) -> str:
        if self.experts > 1:
            return f"{self.experts} × ({self.one})"
        kernel = "×".join(map(str, self.kernel))
        return f"{self.rows}×{self.channels}" + (f" kernel {kernel}" if kernel else "")
