"""Start: from what was seen of a weight to the two factors that its adapter begins with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from peftkit.training.starts.gradients import Gradient
from peftkit.training.starts.inputs import Inputs


@dataclass(frozen=True)
class Seen:
    """One weight, and what a pass over the data saw of it.

    Attributes:
        site: its name, as in messages.
        parameter: the name of the parameter it is of, or is a part of, in the model's state dict.
        weight: W (m, n), read only; dequantised where the base is quantised.
        rank: r of the adapter.
        scale: γ of the adapter.
        matrix: from another tensor in that parameter's place to its W (m, n).
        draws: a generator for random factors, the same in every process.
        gradient: the sketch of G, for starts that need it.
        inputs: the sketch of the inputs, for starts that need it.
    """

    site: str
    parameter: str
    weight: Tensor
    rank: int
    scale: float
    matrix: Callable[[Tensor], Tensor]
    draws: torch.Generator
    gradient: Gradient | None = None
    inputs: Inputs | None = None

    def of_gradient(self) -> Gradient:
        """Return the sketch of G, which is there for starts with needs="gradient"."""
        assert self.gradient is not None
        return self.gradient

    def of_inputs(self) -> Inputs:
        """Return the sketch of the inputs, which is there for starts with needs="inputs"."""
        assert self.inputs is not None
        return self.inputs


class Factors(NamedTuple):
    """B₀ (m, r) and A₀ (r, n), and the share of what the start reads that is in their directions; None of nothing."""

    up: Tensor
    down: Tensor
    energy: float | None = None


class Start(ABC):
    """A way to choose B₀ and A₀. Subclasses are frozen dataclasses of the method's own numbers."""

    #: the name for `pk.start`
    name: ClassVar[str] = ""
    #: what one pass over the data is to see: "nothing", "gradient" or "inputs"
    needs: ClassVar[str] = "nothing"
    #: the sorts of start that it is, of those in `Adapter.takes_start`
    gives: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def factors(self, seen: Seen) -> Factors:
        """Return the factors of one weight."""

    @property
    def whole(self) -> bool:
        """Whether the gradient is to be kept whole, m·n numbers a weight."""
        return False

    @property
    def moves(self) -> bool:
        """Whether training is to begin at ΔW = γ·B₀·A₀, and not at 0."""
        return False
