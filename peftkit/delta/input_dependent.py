"""InputDependent: a change of a layer's output that no matrix ΔW stands for, such as a router's or a gate's."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from peftkit.delta.base import Delta
from peftkit.errors import NotAWeightChangeError
from peftkit.geometry import Geometry


class InputDependent(Delta):
    """A change f(x) of a layer's output that depends on the input in more than a matrix product.

    The change acts by `apply` alone: on the factored route, never on the dense one. Whatever needs the matrix (merge,
    export, the monitor, a weight that is read and not called) raises NotAWeightChangeError.
    """

    is_matrix = False

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the factors are."""

    @abstractmethod
    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        """Return f(x), of the shape of the layer's output. See `Delta.apply`."""

    def dense(self) -> Tensor:
        """Raise NotAWeightChangeError: there is no ΔW."""
        raise NotAWeightChangeError(
            f"{type(self).__name__}: the change depends on the layer's input, so no matrix ΔW of shape {self.shape} "
            "stands for it. Keep the adapter on the model; it cannot be merged, exported or measured"
        )

    def dense_flops(self) -> int:
        """Return 0: there is nothing to build."""
        return 0
