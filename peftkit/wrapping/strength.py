"""How strongly adapters act: λ of each, and blocks inside which some do not act at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from numbers import Real

from torch import nn

from peftkit.errors import MergeStateError, OptionError
from peftkit.wrapping.installed import adapted_modules, names_of
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.state import opened


def require_strength(strength: float) -> None:
    """Raise OptionError unless it is a finite number."""
    try:
        finite = not isinstance(strength, bool) and isinstance(strength, Real) and math.isfinite(strength)
    except OverflowError:
        finite = False
    if not finite:
        raise OptionError(f"strength={strength!r:.100} was given, a finite number was expected")


@of_models
def set_strength(model: nn.Module, strength: float, name: str | None = None) -> None:
    """Set λ of one adapter, or of all: the layer's weight is W + λ·ΔW.

    It holds for all threads, and torch.compile does not compile again for it, also not for 0.

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
                host.adapter_state.strengths[own] = float(strength)
        host.adapter_state.refresh()


@of_models
@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Make a block inside which one adapter, or all, does not act.

    Blocks may nest, and an exception leaves nothing disabled. A block holds for the thread or the async task that
    entered it, and for async tasks started inside it. Code made by torch.compile is not compiled again for it, and runs
    every adapter on a strength of 0 where it is hidden; it follows the blocks of all threads, so one thread at a time
    may use blocks of a compiled model.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        UnknownAdapterError: there is no adapter of that name, or none at all.
        MergeStateError: the adapter is merged into a weight: restore first.
        ConcurrentBlocksError: the model is compiled, and another thread is inside a block that hides other adapters.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> with pk.disabled(model):
        ...     base = model(torch.ones(8))
    """
    with _hiding(model, names_of(model, name)):
        yield


@of_models
@contextmanager
def enabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Make a block inside which only the named adapters act; with no name, none does.

    Blocks may nest with each other and with `disabled`, and an exception leaves nothing disabled. Threads, async tasks
    and torch.compile see a block as they do one of `disabled`.

    Args:
        model: a wrapped model.
        *names: of adapters.

    Raises:
        UnknownAdapterError: there is no adapter of one of the names.
        MergeStateError: another adapter is merged into a weight: restore first.
        ConcurrentBlocksError: the model is compiled, and another thread is inside a block that hides other adapters.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> for name in ("style", "subject"):
        ...     _ = pk.wrap(model, "lora", rank=2, name=name)
        >>> with pk.enabled(model, "style"):
        ...     y = model(torch.ones(8))
    """
    known = names_of(model)
    for name in set(names) - set(known):
        names_of(model, name)
    with _hiding(model, [name for name in known if name not in names]):
        yield


def _hiding(model: nn.Module, names: Collection[str]) -> AbstractContextManager[None]:
    """A block inside which these adapters are hidden, wherever they are on the model."""
    hidden = frozenset(names)
    states = [host.adapter_state for host in adapted_modules(model).values()]
    for state in states:
        merged = () if state.merged is None else state.merged.names
        if stuck := hidden.intersection(merged):
            raise MergeStateError(f"{min(stuck)} is merged into the weights: restore before disabling it")
    # Also where it hides no name: to compiled code, a block inside which all adapters act is one of its own
    return opened({state: hidden.intersection(state.strengths) for state in states})
