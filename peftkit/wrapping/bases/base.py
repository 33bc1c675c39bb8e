"""Base: the weight of a quantised layer, whose rows are dequantised on demand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Base(ABC):
    """The stored numbers of one quantised weight W (m, n), and how its layer is run.

    An instance holds the numbers that the layer holds, no copy of them, and is made at each use: so it is never of
    other numbers than the layer computes with. A subclass is a format; it keeps no state.
    """

    #: what the format is called in messages
    title: ClassVar[str]
    #: the parameters that a layer of this format has beside those of an nn.Linear
    beside: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def holds(cls, module: nn.Module) -> bool:
        """Return whether the module keeps its weight in this format."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Return why a module of this format cannot be adapted; None if it can."""
        del module
        return None

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module) -> Base:
        """Return the weight of a module that `holds` this format."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of W."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating point dtype that W is dequantised to."""

    @property
    def original_dtype(self) -> torch.dtype | None:
        """The dtype that W had before it was quantised; None where the layer keeps no record of it."""
        return self.dtype

    @property
    @abstractmethod
    def stored(self) -> tuple[Tensor, ...]:
        """Every tensor that W is made of, for a checksum and for counting bytes; the first is on W's device."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Return W[start:stop], dequantised to a floating point dtype, without gradients. start < stop ≤ m."""

    @classmethod
    def prepare(cls, module: nn.Module, x: Tensor) -> None:
        """Put the stored numbers into the form in which a call with x needs them, before anything reads them."""
        del module, x

    @classmethod
    def run(cls, module: nn.Module, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's own output, through which x has a gradient and which may be written over.

        Args:
            module: the layer.
            forward: its own forward.
            x: its input.
            *args: what else it was called with.
            **kwargs: likewise.
        """
        del module
        return forward(x, *args, **kwargs)

    @classmethod
    @abstractmethod
    def requantised(cls, module: nn.Module, W: Tensor) -> dict[str, Any]:
        """Return W in this format with the module's settings: by name, the attributes to give the module.

        Args:
            module: the layer, which stays as it is.
            W: (m, n), of floating point.

        Raises:
            UnsupportedLayerError: the settings cannot be known.
        """

    @property
    def device(self) -> torch.device:
        """Where W is."""
        return self.stored[0].device

    @property
    def nbytes(self) -> int:
        """The memory that W takes as it is stored."""
        return sum(tensor.nbytes for tensor in self.stored)


def aligned(start: int, stop: int, total: int, unit: int) -> tuple[int, int]:
    """Return the smallest range of whole units of `unit` numbers that holds [start, stop), the last one cut at total.

    Example:
        >>> from peftkit.wrapping.bases.base import aligned
        >>> aligned(70, 130, 200, 64), aligned(150, 200, 200, 64)
        ((64, 192), (128, 200))
    """
    return start // unit * unit, min(total, math.ceil(stop / unit) * unit)
