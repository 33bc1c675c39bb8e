"""The classes of adapted modules: a subclass made once for each class of module."""

from __future__ import annotations

import functools
from typing import Any, NoReturn, cast

from torch import nn

from peftkit.errors import UnsupportedLayerError
from peftkit.geometry import is_layer
from peftkit.kernels.sharding import fully_sharded
from peftkit.wrapping.experts import AdaptedExperts
from peftkit.wrapping.hooks import follow_class
from peftkit.wrapping.layer import Adapted, AdaptedLayer, AdaptedLookup, AdaptedParameters, base_class
from peftkit.wrapping.lookup import EMBEDDINGS
from peftkit.wrapping.recurrent import AdaptedRecurrent


@functools.cache
def adapted_class(base: type[nn.Module], reads: tuple[str, ...], experts: bool) -> type[Adapted]:
    """The subclass of `base` whose instances are adapted.

    Args:
        base: the class of the module.
        reads: names of parameters to adapt where they are read.
        experts: whether these are stacks of experts.
    """
    properties = {name: property(lambda self, name=name: self.effective(name)) for name in reads}
    own: dict[str, Any] = {**properties, "__module__": __name__, "__reduce_ex__": _reduce, "_base": base}
    bases = (AdaptedExperts, base) if experts else _bases(base, reads)
    return cast("type[Adapted]", type(f"Adapted{base.__name__}", bases, own))


def _bases(base: type[nn.Module], reads: tuple[str, ...]) -> tuple[type, ...]:
    """What an adapted class is made of, in the order in which their `forward` are called."""
    if issubclass(base, nn.RNNBase):
        return AdaptedRecurrent, base
    if "weight" in reads or not (is_layer(base) or issubclass(base, EMBEDDINGS)):
        return AdaptedParameters, base
    if base in EMBEDDINGS:
        return AdaptedLookup, base
    torchs = next((cls for cls in EMBEDDINGS if issubclass(base, cls)), None)
    if torchs is not None:  # the subclass' own forward acts on what torch's layer, adapted, has looked up for it
        return base, adapted_class(torchs, (), False)
    return AdaptedLayer, base


def become_(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make a module one of another class, with the forwards that hooks of accelerate keep on it.

    What fully_shard made of the module's class it is made of the other one too.
    """
    before, divided = type(module), fully_sharded()
    if divided is not None and issubclass(before, divided) and not issubclass(cls, divided):
        cls = _divided_class(divided, cls)
    module.__class__ = cls
    follow_class(module, before)


def expected_class(module: Adapted) -> type[Adapted]:
    """The class that wrapping gave the module."""
    state = module.adapter_state
    return adapted_class(base_class(module), state.reads, isinstance(module, AdaptedExperts))


def as_wrapped(module: Adapted) -> bool:
    """Return whether a module's class is what wrapping made it, or what fully_shard made of that."""
    own, divided = expected_class(module), fully_sharded()
    return type(module) is own or (divided is not None and type(module).__bases__ == (divided, own))


@functools.cache
def _divided_class(divided: type, cls: type[nn.Module]) -> type[nn.Module]:
    """The class that fully_shard makes of another: it divides no class anew, and copies of it cannot be made."""
    made = type(f"FSDP{cls.__name__}", (divided, cls), {"__module__": __name__, "__deepcopy__": _no_copy})
    return cast("type[nn.Module]", made)


def _no_copy(module: nn.Module, memo: dict[int, Any]) -> NoReturn:
    raise UnsupportedLayerError(
        f"{type(module).__name__} is divided among processes (fully_shard), and such a module cannot be copied: "
        "use its state dict"
    )


def _reduce(module: Adapted, protocol: Any) -> Any:
    """What pickle and copy keep of an adapted module: the class below it, not the one that was made of it."""
    _, _, *state = super(Adapted, module).__reduce_ex__(max(2, protocol))
    return _new, (base_class(module), module.adapter_state.reads, isinstance(module, AdaptedExperts)), *state


def _new(base: type[nn.Module], reads: tuple[str, ...], experts: bool) -> Adapted:
    cls = adapted_class(base, reads, experts)
    return cls.__new__(cls)
