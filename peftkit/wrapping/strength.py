"""How strongly adapters act: λ of each, and blocks inside which some do not act at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real

from torch import nn

from peftkit.errors import MergeStateError, OptionError
from peftkit.wrapping.layer import adapted_modules, names_of


def require_strength(strength: float) -> None:
    """Raise OptionError unless it is a finite number."""
    try:
        finite = not isinstance(strength, bool) and isinstance(strength, Real) and math.isfinite(strength)
    except OverflowError:
        finite = False
    if not finite:
        raise OptionError(f"strength={strength!r:.100} was given, a finite number was expected")


def set_strength(model: nn.Module, strength: float, name: str | None = None) -> None:
    """Set λ of one adapter, or of all: the layer's weight is W + λ·ΔW.

    Args:
        model: a wrapped model.
        strength: λ, any finite number: 1 is the adapter as trained, 0 the base itself, bit for bit.
        name: of one adapter; by default all.

    Raises:
        OptionError: strength is not a finite number.
        UnknownAdapterError: there is no adapter of that name, or none at all.
        MergeStateError: the adapter is merged into a weight: restore first.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> pk.set_strength(model, 0.5)
    """
    require_strength(strength)
    names = names_of(model, name)
    for host_name, host in adapted_modules(model).items():
        merged = host.adapter_state.merged
        stuck = [own for own in names if merged is not None and own in merged.names]
        if stuck:
            where = host_name or "the model"
            raise MergeStateError(f"{stuck[0]} is merged into {where}: restore before changing its strength")
    for host in adapted_modules(model).values():
        for own in names:
            if own in host.adapter_state.strengths:
                host.adapter_state.strengths[own].fill_(strength)
        host.adapter_state.refresh()


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Make a block inside which one adapter, or all, does not act.

    Blocks may nest, and an exception leaves nothing disabled.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        UnknownAdapterError: there is no adapter of that name, or none at all.
        MergeStateError: the adapter is merged into a weight: restore first.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> with pk.disabled(model):
        ...     base = model(torch.ones(8))
    """
    with _hidden(model, names_of(model, name)):
        yield


@contextmanager
def enabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Make a block inside which only the named adapters act; with no name, none does.

    Blocks may nest with each other and with `disabled`, and an exception leaves nothing disabled.

    Args:
        model: a wrapped model.
        *names: of adapters.

    Raises:
        UnknownAdapterError: there is no adapter of one of the names.
        MergeStateError: another adapter is merged into a weight: restore first.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> for name in ("style", "subject"):
        ...     _ = pk.wrap(model, "lora", rank=2, name=name)
        >>> with pk.enabled(model, "style"):
        ...     y = model(torch.ones(8))
    """
    known = names_of(model)
    for name in names:
        names_of(model, name)
    with _hidden(model, [name for name in known if name not in names]):
        yield


@contextmanager
def _hidden(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    hosts = adapted_modules(model).values()
    affected = [(host.adapter_state, own) for host in hosts for own in names if own in host.adapters]
    for state, own in affected:
        if state.merged is not None and own in state.merged.names:
            raise MergeStateError(f"{own} is merged into the weights: restore before disabling it")
    block = object()
    for state, own in affected:
        state.hidden.setdefault(own, set()).add(block)
        state.refresh()
    try:
        yield
    finally:
        for state, own in affected:
            state.hidden.get(own, set()).discard(block)  # it may have been unwrapped inside the block
            state.refresh()
