"""Parameters that several adapters have in common: one object, wherever the model is moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from peftkit.kernels.torch_private import own_parameters

if TYPE_CHECKING:
    from peftkit.adapters.base import Adapter


class Common:
    """Marks a parameter that several adapters hold: it is one object in all that have this very mark.

    A copy of the adapters together has a mark of its own in common; a copy of one of them alone shares nothing.
    """

    _now: nn.Parameter | None = None
    _before = 0
    _written = (0, "")
    _loaded: object = None

    def follow(self, adapter: Adapter, name: str, before: nn.Parameter | None) -> None:
        """Let an adapter hold what the others do, where torch has put another parameter in the place of `before`."""
        parameters = own_parameters(adapter)
        if self._now is not None and before is not self._now and id(before) == self._before:
            parameters[name] = self._now
        elif parameters[name] is not before:
            self._before, self._now = id(before), parameters[name]

    def is_first(self, destination: Mapping[str, object], key: str) -> bool:
        """Return whether a state dict that is being made has the parameter under no other key, and note this one."""
        state, noted = self._written
        if state == id(destination) and noted in destination and noted != key:
            return False
        self._written = id(destination), key
        return True

    def is_loaded(self, found: bool, missing: list[str]) -> bool:
        """Return whether the parameter is loaded with the model: from here, or from an adapter before.

        Args:
            found: whether the state dict has it here.
            missing: the list of missing keys, which is one object while a model is loaded.
        """
        if found:
            self._loaded = missing
        return self._loaded is missing

    def __getstate__(self) -> None:
        """Leave out where the parameter was, which is true in this process alone."""


class Held(NamedTuple):
    """A parameter with its mark."""

    parameter: nn.Parameter
    mark: Common


class Shareable(NamedTuple):
    """A parameter that adapters may share."""

    key: str  # in the adapter on the layer
    part: Adapter  # that one, or one inside it
    name: str  # in the part
    parameter: nn.Parameter


def shareable(adapter: Adapter) -> Iterator[Shareable]:
    """Yield what an adapter and those inside it may share with others."""
    for prefix, part in adapter.parts():
        for name in part.shares:
            parameter = own_parameters(part)[name]
            assert parameter is not None
            yield Shareable(f"{prefix}.{name}" if prefix else name, part, name, parameter)


def hold_(own: Shareable, held: Held) -> None:
    """Let an adapter hold a parameter of others in the place of its own."""
    own_parameters(own.part)[own.name] = held.parameter
    own.part.common = {**own.part.common, own.name: held.mark}


@contextmanager
def held_together(adapter: Adapter) -> Iterator[None]:
    """Keep common parameters common in a block in which torch may replace those of one module after another.

    `to_empty` and `load_state_dict(assign=True)` do, and `to` under a flag of torch.__future__.
    """
    before = {name: own_parameters(adapter)[name] for name in adapter.common}
    yield
    for name, mark in adapter.common.items():
        mark.follow(adapter, name, before[name])
