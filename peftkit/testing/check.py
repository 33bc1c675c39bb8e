"""Check an adapter kind against the laws, and report where they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter
from peftkit.errors import LawError, OptionError, UnknownAdapterError
from peftkit.testing.facts import facts_for
from peftkit.testing.laws import LAYERS, Cell, Comparison, laws_for

#: relative to the norms of what is summed: float64 has 16 digits, and an algorithm that subtracts loses some of them
BOUND = 1e-10


@dataclass(frozen=True)
class LawReport:
    """Say which laws an adapter kind was held to, and on which layers. str(report) is a table of layer × law.

    Attributes:
        kind: the name of the adapter.
        held: layer -> the laws that hold on it, in the order in which they were checked.
        refused: layer -> why the adapter cannot be put on it, in the words of its own error.

    Example:
        >>> report = pk.testing.check_laws("lora", rank=2, tucker=True)
        >>> sorted(report.refused)
        ['Conv2d 1×1', 'Linear', 'Linear without bias']
        >>> "forward = merged" in report.held["Conv2d 3×3"]
        True
    """

    kind: str
    held: dict[str, tuple[str, ...]]
    refused: dict[str, str]

    def __str__(self) -> str:
        laws = list(dict.fromkeys(law for held in self.held.values() for law in held))
        layers = [*self.held, *self.refused]
        wide = max(map(len, [self.kind, *laws]))
        lines = ["  ".join([self.kind.ljust(wide), *layers])]
        for law in laws:
            cells = [self._cell(layer, law).ljust(len(layer)) for layer in layers]
            lines.append("  ".join([law.ljust(wide), *cells]).rstrip())
        return "\n".join([*lines, *(f"{layer} is refused: {reason}" for layer, reason in self.refused.items())])

    def _cell(self, layer: str, law: str) -> str:
        if layer in self.refused:
            return "refused"
        return "holds" if law in self.held[layer] else "–"


def check_laws(kind: str | type[Adapter], **options: Any) -> LawReport:
    """Hold a registered adapter kind to the laws on small layers, in float64.

    A fresh adapter changes nothing, bit for bit. After its parameters have moved: every method of its ΔW agrees with
    `dense`; the strength is linear; the factored and the dense route, and the merged weight, give the same output; the
    gradients are those of a layer with the weight W + ΔW; merge and restore return every bit; copies and files give
    the same output; what the kind states of its parameters, for training and for scaling, is true. A layer that the
    adapter refuses with an `OptionError` is reported as refused. A change that depends on the layer's input is held to
    the laws that need no matrix. The random state is put back.

    Args:
        kind: the name under which the adapter is registered, or its class.
        **options: the adapter's own, as in `wrap`.

    Returns:
        The report; print it for a table of layer × law.

    Raises:
        LawError: a law does not hold. The message names the law, the layer, the difference and the bound.
        UnknownAdapterError: the adapter is not registered.
        OptionError: every layer is refused: an option is unknown or not possible.

    Example:
        >>> print(pk.testing.check_laws("ia3"))  # doctest: +ELLIPSIS
        ia3 ...
        identity: output ... holds ...
    """
    if not isinstance(kind, str):
        if kind.kind not in registry.kinds() or registry.get(kind.kind) is not kind:
            raise UnknownAdapterError(f"{kind.__qualname__} is not registered: decorate it with peftkit.register(name)")
        kind = kind.kind
    name = registry.get(kind).kind
    held: dict[str, tuple[str, ...]] = {}
    refused: dict[str, OptionError] = {}
    with torch.random.fork_rng(devices=[]):
        for layer in LAYERS:
            cell = Cell(kind, options, layer)
            try:
                cell.wrapped()
            except OptionError as error:
                refused[layer] = error
            else:
                held[layer] = _held(name, cell)
    if not held:
        raise next(iter(refused.values()))
    return LawReport(name, held, {layer: str(error) for layer, error in refused.items()})


def _held(name: str, cell: Cell) -> tuple[str, ...]:
    """The laws that hold, which are all that have a meaning for the adapter; LawError at the first that fails."""
    held: dict[str, None] = {}
    for law in (*laws_for(cell), *facts_for(cell)):
        for comparison in law(cell):
            require_equal(name, cell.layer, comparison)
            held[comparison.law] = None
    return tuple(held)


def require_equal(kind: str, layer: str, comparison: Comparison) -> None:
    """Raise LawError unless the two tensors of a comparison are equal, as far as it says."""
    law, got, expected, terms = comparison
    where = f"{kind} on {layer}: {law!r} does not hold"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise LawError(
            f"{where}: got {tuple(got.shape)} of {got.dtype}, expected {tuple(expected.shape)} of {expected.dtype}"
        )
    got, expected = got.detach(), expected.detach()
    largest = (got - expected).abs().max().item()
    size = 0.0 if terms is None else math.hypot(*(t.detach().norm().item() for t in (expected, *terms)))
    if not largest <= BOUND * size:  # NaN is not below it either
        raise LawError(f"{where}: the largest difference is {largest:.3g}, expected at most {BOUND * size:.3g}")
