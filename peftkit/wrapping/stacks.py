"""Stacks of experts: parameters (E, out, in) or (E, in, out), the matrices of all experts of a layer in one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from peftkit.delta import Delta
from peftkit.delta.base import recomputed
from peftkit.geometry import Geometry, Shape, is_layer
from peftkit.kernels.blocks import accumulation_dtype
from peftkit.kernels.torch_private import own_parameters

#: what modules call the number of their experts
COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")

#: numbers in the part of a stack that is added to at once
_AT_ONCE = 1 << 24


class StackGeometry(Geometry):
    """Reads a stack of experts (E, m, n), or (E, n, m), as a matrix (E·m, n): one expert below the other.

    run(x, M)  expert e maps the e-th run of n inputs to the e-th run of m outputs: (…, E·n) -> (…, E·m)

    Args:
        sizes: The shape of the parameter.
        transposed: Whether the parameter holds each matrix as (in, out).
        said: Whether the module says so itself, as PEFT asks.
    """

    def __init__(self, sizes: Sequence[int], transposed: bool, said: bool = True) -> None:
        self.said = said
        self.experts, rows, columns = sizes if not transposed else (sizes[0], sizes[2], sizes[1])
        super().__init__(torch.Size((rows, columns)))
        self.transposed, self.groups = transposed, self.experts
        self.shape = Shape(self.experts * rows, columns, groups=self.experts)

    def bands(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if self.transposed else weight

    def matrix(self, weight: Tensor) -> Tensor:
        return self.bands(weight).reshape(self.shape.rows, self.shape.columns)

    def weight(self, matrix: Tensor) -> Tensor:
        return self.bands(matrix.unflatten(0, (self.experts, -1)))

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.einsum("...en,emn->...em", x.unflatten(-1, (self.experts, -1)), self.bands(weight)).flatten(-2)
        return y if bias is None else y + bias

    def expand(self, h: Tensor, B: Tensor) -> Tensor:
        own = B.to(h.dtype).unflatten(0, (self.experts, -1))
        return torch.einsum("...er,emr->...em", h.unflatten(-1, (self.experts, -1)), own).flatten(-2)

    def changed(self, weight: Tensor, deltas: Sequence[Delta]) -> Tensor:
        """Return W + Σ ΔW, rounded once, in the shape and the dtype of the weight. No ΔW waits for backward.

        Args:
            weight: of all these experts, or of as many of them as each ΔW is of.
            deltas: ΔW (k·m, n) of k experts each.
        """
        if not deltas:
            return weight
        if all(delta.keeps_factors for delta in deltas):
            return self._changed(weight, deltas)
        return recomputed(lambda W: self._changed(W, deltas), weight, lambda: [f for d in deltas for f in d.factors])

    def _changed(self, weight: Tensor, deltas: Sequence[Delta]) -> Tensor:
        """W + Σ ΔW, some experts at a time, outside autocast."""
        acc, each = accumulation_dtype(weight.dtype), max(1, weight[0].numel())
        parts: list[Tensor] = []
        with torch.autocast(weight.device.type, enabled=False):
            for first in range(0, weight.shape[0], max(1, _AT_ONCE // each)):
                some = slice(first, min(first + max(1, _AT_ONCE // each), weight.shape[0]))
                part = weight[some].to(acc)
                for delta in deltas:
                    part = part + self.bands(delta.matrices(some).to(acc))
                parts.append(part.to(weight.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def stacks(module: nn.Module) -> dict[str, StackGeometry]:
    """Return how the parameters of a module that are stacks of experts are read, by name.

    A stack has three dimensions, of which the first is the number of experts that the module names as `num_experts` or
    the like. Matrices are (out, in), unless the module says `is_transposed`, as the experts of transformers do, or the
    sizes of `gate_up_proj` beside `down_proj` tell that they are (in, out).
    """
    found = {name: p for name, p in _stacked(module).items() if p.dtype.is_floating_point and p.dtype.itemsize > 1}
    transposed, said = _transposed(module, found), isinstance(vars(module).get("is_transposed"), bool)
    return {name: StackGeometry(p.shape, transposed, said) for name, p in found.items() if p.numel()}


def turned(geometry: Geometry) -> bool:
    """Return whether PEFT takes a stack of experts (E, in, out) for one of (E, out, in)."""
    return isinstance(geometry, StackGeometry) and geometry.transposed and not geometry.said


def why_no_stack(module: nn.Module) -> str | None:
    """Return why the stacks of experts of a module cannot be adapted; None where it has none."""
    found = next(iter(_stacked(module).values()), None)
    if found is None:
        return None
    return f"its experts are {found.dtype}, of {found.numel()} numbers: a quantised or empty base has no ΔW to add to"


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that have one matrix for each of its experts."""
    if is_layer(module):
        return {}
    counts = [count for name in COUNTS if isinstance(count := vars(module).get(name), int)]
    own = {name: p for name, p in own_parameters(module).items() if counts and p is not None and not is_lazy(p)}
    return {name: p for name, p in own.items() if p.dim() == 3 and p.shape[0] in counts}


def _transposed(module: nn.Module, found: dict[str, nn.Parameter]) -> bool:
    """Whether the matrices are (in, out)."""
    said = vars(module).get("is_transposed")
    if isinstance(said, bool):
        return said
    up, down = found.get("gate_up_proj"), found.get("down_proj")
    return up is not None and down is not None and up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1]
