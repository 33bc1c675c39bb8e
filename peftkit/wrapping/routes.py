"""Two ways to apply ΔW, and which is cheaper for one call.

factored  the base layer's output plus ΔW·x through the factors
dense     one layer call with W + ΔW as its weight; or, where the layer computes in 16 bits, its output plus a second
          call with ΔW alone, since rounding W + ΔW to 16 bits loses most of a small ΔW
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkit.delta import Delta
from peftkit.delta.base import ELEMENT, recomputed
from peftkit.geometry import Geometry, Shape
from peftkit.kernels.blocks import accumulation_dtype
from peftkit.kernels.torch_private import eager, known_true

ROUTES = ("auto", "factored", "dense")

#: output positions of a call for which the route is chosen where their number is not known
OUTPUTS = 4096


def choose(deltas: Sequence[Delta], shape: Shape, outputs: int, training: bool, narrow: bool) -> str:
    """Return "factored" or "dense", by counted operations.

    outputs: output positions of this call. training: the call is differentiated. narrow: it computes in 16 bits.
    """
    factored, dense = _operations(deltas, shape, outputs, training, narrow)
    return "factored" if factored <= dense else "dense"


def choose_compiled(deltas: Sequence[Delta], shape: Shape, outputs: int, training: bool, narrow: bool) -> str:
    """As `choose`, for code that torch.compile or torch.export reads: as for OUTPUTS where `outputs` is symbolic.

    To compare a symbolic number would make the code valid for one range of batch sizes, and forbid any other.
    """
    factored, dense = _operations(deltas, shape, outputs, training, narrow)
    if known_true(factored <= dense):
        return "factored"
    if known_true(factored > dense):
        return "dense"
    return choose(deltas, shape, OUTPUTS, training, narrow)


def choose_lookup(shape: Shape, outputs: int) -> str:
    """Return the route of an embedding: "dense" where more rows are looked up than ΔW has."""
    more = outputs > shape.rows if eager() else known_true(outputs > shape.rows)
    return "dense" if more else "factored"


def _operations(
    deltas: Sequence[Delta], shape: Shape, outputs: int, training: bool, narrow: bool
) -> tuple[float, float]:
    """The operations of the factored and of the dense route; an infinite number where there is no dense one."""
    if not all(delta.is_matrix for delta in deltas):
        return 0, math.inf
    layer = 2 * outputs * shape.rows * shape.columns
    build = sum(d.dense_flops() for d in deltas) + ELEMENT * shape.rows * shape.columns
    factored = sum(d.apply_flops(outputs) for d in deltas)
    if training:
        # backward: the input's and the factors' gradients, each about as much as the product itself
        factored *= 3
        # ΔW is built and applied again for backward, differentiated back to its factors, and has a gradient of its own
        dense = 4 * build + 2 * layer + (2 * layer if narrow else 0)
    else:
        dense = build + (layer if narrow else 0)
    return factored, dense


def dense(x: Tensor, g: Geometry, weight: Tensor | None, bias: Tensor | None, deltas: Sequence[Delta]) -> Tensor:
    """Return the layer called with W + Σ ΔW, or with Σ ΔW alone. Nothing of their size waits for backward.

    Args:
        x: the layer's input.
        g: the geometry of the layer.
        weight: W in its layer's shape, or None.
        bias: (m,), or None.
        deltas: the ΔW to add.
    """

    def reads() -> list[Tensor]:
        factors = [factor for delta in deltas for factor in delta.factors]
        return factors if weight is None else [*factors, weight]

    return recomputed(lambda x: g.call(x, _weight(x, g, weight, deltas), bias), x, reads)


def _weight(x: Tensor, g: Geometry, weight: Tensor | None, deltas: Sequence[Delta]) -> Tensor:
    return g.weight(total(deltas).to(x.dtype)) if weight is None else changed(weight, deltas, g)


def total(deltas: Sequence[Delta]) -> Tensor:
    """Σ ΔW (m, n), summed in at least fp32, outside autocast."""
    with torch.autocast(deltas[0].device.type, enabled=False):
        first = deltas[0].dense()
        first = first.to(accumulation_dtype(first.dtype))
        return functools.reduce(lambda M, delta: delta.added_to(M), deltas[1:], first)


def changed(weight: Tensor, deltas: Sequence[Delta], g: Geometry) -> Tensor:
    """W + Σ ΔW, rounded once, in the shape, the dtype and the memory format of the layer's weight."""
    acc = accumulation_dtype(weight.dtype)
    return (weight.to(acc) + g.weight(total(deltas))).to(weight.dtype)
