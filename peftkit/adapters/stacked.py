"""Adapters of a stack of experts: the kind's own parameters with a leading dimension, and ΔW of each expert."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.delta.base import Delta, WeightCache
from peftkit.delta.stack import Stack
from peftkit.geometry import Shape
from peftkit.kernels.cache import Memo
from peftkit.kernels.torch_private import own_buffers, own_modules, own_parameters


class Stacked(Adapter):
    """Mixed into the class of a kind: one adapter for all the matrices (m, n) of a stack of experts.

    Every parameter and buffer of the kind, (…), is here (E, …), and ΔW of expert e is what the kind makes of slice e
    and of the expert's matrix. W is (E·m, n), or (E, m, n).
    """

    def __init__(self, shape: Shape, weight: Tensor, **options: Any) -> None:
        kind = kind_of(type(self))
        matrices = weight.unflatten(0, (shape.experts, -1)).unbind()
        cast(Any, kind.__init__)(self, shape.one, matrices[0], **options)
        others = [kind(shape.one, matrix, **options) for matrix in matrices[1:]]
        _stack_(self, others)

    def takes_start(self) -> str:
        return ""

    def at(self, weight: Tensor, strength: float | Tensor) -> Delta:
        if type(self).batched:
            return super().at(weight, strength)
        experts = self.experts
        matrices = [weight] * len(experts)
        if self.reads_base:
            matrices = (weight if weight.dim() == 3 else weight.unflatten(0, (len(experts), -1))).unbind()
        return Stack(tuple(own.at(W, strength) for own, W in zip(experts, matrices, strict=True)))

    def delta(self, weight: Tensor) -> Delta:
        if type(self).batched:
            return cast(Any, kind_of(type(self)).delta)(self, weight)
        return self.at(weight, 1.0)

    def refused(self, tensors: Mapping[str, Tensor]) -> str:
        slices = ({key: tensor[expert] for key, tensor in tensors.items()} for expert in range(self.count))
        return next(filter(None, (one.refused(own) for one, own in zip(self.experts, slices, strict=True))), "")

    def inner_and_sqnorm(self, weight: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        return Adapter.inner_and_sqnorm(self, weight, cache)  # the kind's own is of one matrix

    @property
    def count(self) -> int:
        """The number of experts, E."""
        return next(iter((*self.parameters(), *self.buffers()))).shape[0]

    @property
    def experts(self) -> tuple[Adapter, ...]:
        """The adapter of each expert, whose parameters are views of this one's."""
        kind = kind_of(type(self))
        return tuple(_view(self, index, kind) for index in range(self.count))

    def some(self, experts: Tensor) -> Stacked:
        """Return the adapter of some of the experts. experts: (k,) their numbers."""
        return cast(Stacked, _view(self, experts, type(self)))

    @torch.no_grad()
    def project_(self) -> None:
        for own in self.experts:
            own.project_()

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        for own, W in zip(self.experts, weight.unflatten(0, (self.count, -1)), strict=True):
            own.rebase_(W)

    @torch.no_grad()
    def refresh_(self) -> None:
        for own in self.experts:
            own.refresh_()

    def derived(self) -> dict[str, Tensor]:
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {key: named[key] for key in self.experts[0].derived()}

    def form(self, weight: Tensor) -> None:
        del weight  # no program but PEFT has stacks of experts, and PEFT holds their ΔW

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return _new, (kind_of(type(self)),), *state


@functools.cache
def stacked(kind: type[Adapter]) -> type[Stacked]:
    """Return the class of a kind's adapters on stacks of experts."""
    return type(f"Stacked{kind.__name__}", (Stacked, kind), {"__module__": __name__})


def kind_of(cls: type[Adapter]) -> type[Adapter]:
    """Return the class of the kind, which adapts one matrix."""
    mro = cls.__mro__
    return mro[mro.index(Stacked) + 1] if issubclass(cls, Stacked) else cls


def _new(kind: type[Adapter]) -> Stacked:
    cls = stacked(kind)
    return cls.__new__(cls)


def _stack_(first: nn.Module, others: list[Any]) -> None:
    """Give a module parameters and buffers with a leading dimension: its own, and those of modules made like it."""
    parameters, buffers = own_parameters(first), own_buffers(first)
    for name, parameter in parameters.items():
        if parameter is not None:
            every = [parameter.detach(), *(own_parameters(other)[name] for other in others)]
            parameters[name] = nn.Parameter(torch.stack(cast("list[Tensor]", every)).detach(), parameter.requires_grad)
    for name, buffer in buffers.items():
        if buffer is not None:
            buffers[name] = torch.stack(cast("list[Tensor]", [buffer, *(own_buffers(other)[name] for other in others)]))
    for name, child in own_modules(first).items():
        if child is not None:
            _stack_(child, [own_modules(other)[name] for other in others])


def _view(module: nn.Module, index: int | Tensor, cls: type[nn.Module]) -> Any:
    """A module with slices of the parameters and buffers of a stacked one, and with all else it has."""
    own: dict[str, Any] = {n: Memo() if isinstance(value, Memo) else value for n, value in vars(module).items()}
    own["_parameters"] = {n: None if p is None else p[index] for n, p in own_parameters(module).items()}
    own["_buffers"] = {n: None if b is None else b[index] for n, b in own_buffers(module).items()}
    own["_modules"] = {
        n: None if child is None else _view(child, index, type(child)) for n, child in own_modules(module).items()
    }
    if isinstance(index, int) and "shape" in own:
        own["shape"] = own["shape"].one
    view = object.__new__(cls)
    vars(view).update(own)
    return view
