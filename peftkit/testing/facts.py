"""What an adapter states of its own parameters, held to what they do: for training, and for scaling ΔW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from peftkit.adapters.base import Adapter
from peftkit.testing.laws import Cell, Comparison, parts_of

#: by how much decay shrinks the parameters from one measurement to the next, and how often it is measured
_SHRINK, _TIMES = 0.7, 12


def zero_factors(adapter: Adapter, W: Tensor) -> frozenset[str]:
    """Return the trained factors at 0 that have a gradient where others, not at 0, have none; none if there are none.

    Args:
        adapter: a fresh one.
        W: (m, n), the weight that it is of.
    """
    trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    change = adapter(W, 1.0).dense()
    change.backward(torch.randn_like(change))
    moving = {name for name, p in trained.items() if p.grad is not None and p.grad.any()}
    at_zero = {name for name, p in trained.items() if not p.any()}
    return frozenset(at_zero & moving if trained.keys() - at_zero - moving else ())


def _starts(cell: Cell) -> Iterator[Comparison]:
    """What is said to start at zero does, and the other factors wait for it."""
    adapter, W, _, _ = parts_of(cell.wrapped(moved=False)[0])
    present = [name for name, _ in adapter.named_parameters()]
    if not adapter.starts_at_zero:
        return  # `ratio=` is refused where nothing is said
    found = zero_factors(adapter, W)
    said, expected = ([float(name in names) for name in present] for names in (adapter.starts_at_zero, found))
    yield Comparison("starts_at_zero", torch.tensor(said), torch.tensor(expected), None)


@torch.no_grad()
def _decay(cell: Cell) -> Iterator[Comparison]:
    """Decay leaves a fresh adapter at ΔW = 0, and takes ΔW there from where the decayed parameters alone have moved."""
    adapter, W, _, _ = parts_of(cell.wrapped(moved=False)[0])
    decayed = [p for name, p in adapter.named_parameters() if name in adapter.decays]
    if not decayed:
        return
    _scale(decayed, _SHRINK)
    start = adapter(W, 1.0).dense()
    yield Comparison("decay keeps ΔW = 0", start, torch.zeros_like(start), None)
    for parameter in decayed:
        parameter.add_(0.2 * torch.randn_like(parameter))
    norms = []
    for _ in range(_TIMES):
        norms.append(adapter(W, 1.0).dense().norm())
        _scale(decayed, _SHRINK)
    sizes = torch.stack(norms)
    growth = sizes.diff().clamp(min=0)
    yield Comparison("decay shrinks ΔW", growth, torch.zeros_like(growth), (sizes,))
    _scale(decayed, 0.0)
    end = adapter(W, 1.0).dense()
    yield Comparison("decay ends at ΔW = 0", end, torch.zeros_like(end), None)


@torch.no_grad()
def _scaling(cell: Cell) -> Iterator[Comparison]:
    """The parameters that scale ΔW, times a number, make it that number times ΔW."""
    adapter, W, _, _ = parts_of(cell.wrapped()[0])
    scaling = [p for name, p in adapter.named_parameters() if name in adapter.scaling_parameters]
    if scaling:
        before = adapter(W, 1.0).dense()
        _scale(scaling, 0.3)
        yield Comparison("scaling_parameters", adapter(W, 1.0).dense(), 0.3 * before, (before,))


def _scale(parameters: Iterable[Tensor], by: float) -> None:
    for parameter in parameters:
        parameter.mul_(by)


def facts_for(cell: Cell) -> tuple[Callable[[Cell], Iterator[Comparison]], ...]:
    """The laws of what the adapter states of its parameters, where its change is a matrix ΔW."""
    adapter, W, _, _ = parts_of(cell.wrapped()[0])
    return (_starts, _decay, _scaling) if adapter(W, 1.0).is_matrix else ()
