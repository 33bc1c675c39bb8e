"""The adapters by name. A duplicate is refused; an unknown name or option lists what exists."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from peftkit.adapters.base import Adapter
from peftkit.adapters.form import Additive
from peftkit.adapters.options import require
from peftkit.adapters.stacked import stacked
from peftkit.delta import Delta
from peftkit.errors import DuplicateNameError, OptionError, UnknownAdapterError, did_you_mean
from peftkit.geometry import Shape

AdapterType = TypeVar("AdapterType", bound=type[Adapter])

_CLASSES: dict[str, type[Adapter]] = {}
_ALIASES: dict[str, str] = {}

#: what fp32 holds; NaN is not below it, nor is an integer that no float can hold
_LARGEST = torch.finfo(torch.float32).max

#: options that turn any additive adapter into the inner part of a weight decomposition
_DECOMPOSITION = ("axis", "detach_norm")


def register(kind: str, *aliases: str) -> Callable[[AdapterType], AdapterType]:
    """Return a class decorator that makes an Adapter available under a name and its aliases.

    Args:
        kind: The name, which files and messages show.
        *aliases: Other names for `pk.wrap`.

    Raises:
        DuplicateNameError: A name is taken.
    """

    def add(cls: AdapterType) -> AdapterType:
        for name in (kind, *aliases):
            if name in _CLASSES or name in _ALIASES:
                taken = _CLASSES[_ALIASES.get(name, name)]
                raise DuplicateNameError(
                    f"cannot register {cls.__qualname__} as {name!r}: "
                    f"that name is {taken.__module__}.{taken.__qualname__}'s"
                )
        cls.kind = kind
        _CLASSES[kind] = cls
        _ALIASES.update(dict.fromkeys(aliases, kind))
        return cls

    return add


def kinds() -> tuple[str, ...]:
    """Return the registered names, without aliases."""
    return tuple(_CLASSES)


def aliases(kind: str) -> tuple[str, ...]:
    """Return the other names of a registered kind."""
    return tuple(alias for alias, name in _ALIASES.items() if name == kind)


def get(kind: str) -> type[Adapter]:
    """Return the class that is registered under a name or an alias.

    Raises:
        UnknownAdapterError: There is none.

    Example:
        >>> from peftkit.adapters import registry
        >>> registry.get("locon").kind
        'lora'
    """
    if not isinstance(kind, str):
        raise UnknownAdapterError(f"an adapter is named by a string, not {kind!r}; there are: {', '.join(kinds())}")
    name = _ALIASES.get(kind, kind)
    if name not in _CLASSES:
        known = [*_CLASSES, *_ALIASES]
        hint = did_you_mean(kind, known)
        raise UnknownAdapterError(f"no adapter is called {kind!r}; there are: {', '.join(known)}.{hint}")
    return _CLASSES[name]


def additive(delta: Delta) -> Additive:
    """Return a ΔW in the form that files give to its structure: the matrix itself where it has none."""
    own = get(delta.structure).additive if delta.structure else None
    return (own or Additive)(delta)


def option_names(cls: type[Adapter]) -> tuple[str, ...]:
    """Return the names of the options that a class takes."""
    return tuple(p.name for p in _parameters(cls) if p.kind is inspect.Parameter.KEYWORD_ONLY)


def takes(cls: type[Adapter], option: str) -> bool:
    """Return whether a class takes an option, itself or for the adapter inside it."""
    return option in option_names(cls) or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(cls))


@functools.cache  # a model has hundreds of layers, and a signature takes longer to read than an adapter to make
def _parameters(cls: type[Adapter]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(cls.__init__).parameters.values())


@functools.cache
def _hints(cls: type[Adapter]) -> dict[str, Any]:
    return get_type_hints(cls.__init__)


def build(kind: str, shape: Shape, weight: Tensor, dtype: torch.dtype | None = None, /, **options: Any) -> Adapter:
    """Make an adapter for one weight matrix.

    Args:
        kind: A registered name or alias.
        shape: The shape of the weight.
        weight: W (m, n), read for its device, its dtype and, by algorithms that start from it, its values.
        dtype: The dtype of the adapter's parameters, by default at least fp32.
        **options: The algorithm's own options, and `decompose`, which makes it the inner adapter of a DoRA.

    Raises:
        UnknownAdapterError: No adapter has this name.
        OptionError: The algorithm does not have an option, or the option cannot take the value.

    Example:
        >>> from peftkit.adapters import registry
        >>> from peftkit.geometry import Shape
        >>> registry.build("lora", Shape(8, 16), torch.zeros(8, 16), rank=2).delta(torch.zeros(8, 16))
        B(8×2)·A(2×16)
    """
    cls = get(kind)
    decompose = options.pop("decompose", False)
    require(isinstance(decompose, bool), cls.kind, "decompose", decompose, "True or False")
    if decompose:
        if cls.reads_base:
            raise OptionError(
                f"{cls.kind}: decompose=True was given, but its ΔW depends on the base; "
                f"it works with {', '.join(k for k in kinds() if not _CLASSES[k].reads_base)}"
            )
        return build("dora", shape, weight, dtype, inner=cls.kind, **options)
    _refuse_unknown(cls, options)
    options = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    _check_types(cls, options)
    adapter = (stacked(cls) if shape.experts > 1 else cls)(shape, weight, **options)
    given = {**options, **adapter.options} if "options" in adapter.__dict__ else options
    defaults = {
        p.name: p.default
        for p in _parameters(cls)
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not inspect.Parameter.empty
    }
    adapter.options, adapter.shape = {**defaults, **given}, shape
    if weight.is_meta:
        adapter.unset = True
    return adapter if dtype is None else adapter.to(dtype)


def _check_types(cls: type[Adapter], options: dict[str, Any]) -> None:
    """Every option is of the type its signature declares; a bool is no number, and a number is finite."""
    hints = _hints(cls)
    for name, value in options.items():
        declared = hints.get(name, Any)  # DoRA passes the rest on to its inner adapter, where it is checked
        choices = get_args(declared) if isinstance(declared, UnionType) else (declared,)
        if declared is not Any and not any(_is_a(value, choice) for choice in choices):
            expected = str(declared.__name__ if isinstance(declared, type) else declared)
            require(False, cls.kind, name, value, f"{expected}{', finite' if 'float' in expected else ''}")


def _is_a(value: object, declared: Any) -> bool:
    if declared is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(declared, type) and get_origin(declared) is None:
        return isinstance(value, declared)
    if get_origin(declared) is tuple:
        kinds = get_args(declared)
        return isinstance(value, (tuple, list)) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    return True


def _refuse_unknown(cls: type[Adapter], options: dict[str, Any]) -> None:
    accepts_inner = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(cls))
    known = option_names(cls)
    unknown = [] if accepts_inner else [name for name in options if name not in known]
    if not unknown:
        return
    name = unknown[0]
    having = [k for k, c in _CLASSES.items() if name in option_names(c)]
    if name in _DECOMPOSITION and not cls.reads_base:
        having.append(f"{cls.kind} with decompose=True")
    elsewhere = f" {name!r} is an option of {', '.join(having)}." if having else did_you_mean(name, known)
    extra = () if cls.reads_base else ("decompose",)
    raise OptionError(f"{cls.kind} has no option {name!r}; it has {', '.join((*known, *extra)) or 'none'}.{elsewhere}")
