"""Two ways to apply ΔW, and which is cheaper for one call.

factored  the base layer's output plus ΔW·x through the factors
dense     one layer call with W + ΔW as its weight; or, where the layer computes in 16 bits, its output plus a second
          call with ΔW alone, since rounding W + ΔW to 16 bits loses most of a small ΔW
"""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.delta import Delta
from peftkit.geometry import Shape

ROUTES = ("auto", "factored", "dense")

# What touching one element of a fresh (m, n) matrix costs, in multiply-adds: memory, against a matrix product
_ELEMENT = 40


def choose(deltas: Sequence[Delta], shape: Shape, outputs: int, training: bool, narrow: bool) -> str:
    """ "factored" or "dense" by counted operations.

    outputs: output positions of this call. training: the call is differentiated. narrow: it computes in 16 bits.
    """
    layer = 2 * outputs * shape.rows * shape.columns
    build = sum(d.dense_flops() for d in deltas) + _ELEMENT * shape.rows * shape.columns
    factored = sum(d.apply_flops(outputs) for d in deltas)
    if training:
        # backward: the input's and the factors' gradients, each about as much as the product itself
        factored *= 3
        # ΔW is built again for backward, differentiated back to its factors, and needs a gradient of its own
        dense = 4 * build + layer + (2 * layer if narrow else 0)
    else:
        dense = build + (layer if narrow else 0)
    return "factored" if factored <= dense else "dense"
