"""Which format a module keeps its weight in."""

from __future__ import annotations

from torch import Tensor, nn

from peftkit.kernels.torch_private import compiling
from peftkit.wrapping.bases.base import Base
from peftkit.wrapping.bases.bitsandbytes import EightBit, FourBit
from peftkit.wrapping.bases.fp8 import FineGrainedFP8
from peftkit.wrapping.bases.matrix import QuantisedMatrix
from peftkit.wrapping.bases.torchao import TorchAO

#: every format there is
FORMATS: tuple[type[Base], ...] = (FourBit, EightBit, TorchAO, FineGrainedFP8)


def format_of(module: nn.Module) -> type[Base] | None:
    """Return the format of a module's quantised weight; None for a module whose weight is no such weight."""
    return next((each for each in FORMATS if each.holds(module)), None)


def matrix_of(base: Base) -> Tensor:
    """Return W (m, n) as a tensor whose rows are dequantised where they are read.

    Under torch.compile it is dequantised whole, by operations that are part of the code.
    """
    return base.rows(0, base.shape[0]).to(base.dtype) if compiling() else QuantisedMatrix(base)
