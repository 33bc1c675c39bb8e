"""Extras: parameters of the model that train beside the adapters (heads, norms, biases, embeddings), and their past."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkit.errors import MergeStateError, UnsetAdapterError, UnsupportedLayerError
from peftkit.kernels.sharding import divided_as
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.walk import dotted, named_modules

# What the parameters of a module were before `load` wrote to them, kept on the module: name -> Replaced, oldest first
_REPLACED = "_peftkit_replaced"


@dataclass(frozen=True, eq=False)
class BaseParameter:
    """One parameter of the model that is no adapter's, by its name in the model, as "head.weight"."""

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter itself, past what an adapted class makes of reading it."""
        found = own_parameters(self.module)[self.key]
        assert found is not None
        return found


@dataclass
class Replaced:
    """What a parameter was before the file of an adapter was loaded over it: its value, and whether it trained."""

    adapter: str
    value: Tensor
    trained: bool


def base_parameters(model: nn.Module, *, every_name: bool = False) -> Iterator[BaseParameter]:
    """Yield the model's own parameters, without those of adapters, in the order of its modules.

    Args:
        model: with or without adapters.
        every_name: a parameter in several places comes under each of its names, not just the first.
    """
    seen: set[int] = set()
    for name, module in named_modules(model, every_name=every_name):
        for key, parameter in own_parameters(module).items():
            if parameter is not None and (every_name or id(parameter) not in seen):
                seen.add(id(parameter))
                yield BaseParameter(dotted(name, key), module, key)


def extras_of(model: nn.Module) -> dict[str, BaseParameter]:
    """Return the parameters that train beside the adapters, by name, each once.

    Raises:
        UnsetAdapterError: one of them has no values: hooks that load it for each call keep what it was, and none of
            what it learned.
    """
    found = {own.name: own for own in base_parameters(model) if own.tensor.requires_grad}
    unset = next((name for name, own in found.items() if own.tensor.is_meta), None)
    if unset is not None:
        raise UnsetAdapterError(
            f"{unset} requires gradients and is on the meta device: hooks of accelerate that offload a parameter do "
            "not let it train. Freeze it, or take the hooks off (accelerate.hooks.remove_hook_from_submodules)"
        )
    return found


def require_unmerged(parameters: Collection[BaseParameter]) -> None:
    """Raise MergeStateError for a parameter that has adapters merged into it now."""
    for own in parameters:
        state = own.module.adapter_state if isinstance(own.module, Adapted) else None
        if state is not None and state.merged is not None and own.key in {s.parameter for s in state.slots.values()}:
            raise MergeStateError(
                f"{own.name} trains beside the adapters, and {', '.join(state.merged.names)} is merged into it: "
                "restore(model) first"
            )


@torch.no_grad()
def replace_(values: Mapping[BaseParameter, Tensor], adapter: str) -> None:
    """Write values into parameters in place, keep what they were for `give_back_`, and let them train.

    Args:
        values: parameter -> its new value, of the same shape.
        adapter: the name under which the values were loaded.
    """
    for own, value in values.items():
        parameter = own.tensor
        past = own.module.__dict__.setdefault(_REPLACED, {}).setdefault(own.key, [])
        past.append(Replaced(adapter, parameter.detach().clone(), parameter.requires_grad))
        parameter.copy_(divided_as(parameter, value))
        parameter.requires_grad_(True)


def require_returnable(model: nn.Module, names: Collection[str], *, keep: bool) -> None:
    """Raise unless `give_back_`, with the same arguments, could do its work."""
    for own, past in _replaced(model):
        lost = next((r for r in past if r.adapter in names), None)
        if keep or lost is None:
            continue
        require_unmerged([own])
        if lost.value.shape != own.tensor.shape:
            raise UnsupportedLayerError(
                f"{own.name} is {tuple(own.tensor.shape)}, and was {tuple(lost.value.shape)} before {lost.adapter!r} "
                "was loaded: give it that shape before unwrapping"
            )


@torch.no_grad()
def give_back_(model: nn.Module, names: Collection[str], *, keep: bool) -> None:
    """Make the parameters what they were before these adapters were loaded, with their gradient flags.

    Args:
        model: the model of the parameters.
        names: of the adapters that go.
        keep: leave the values that the parameters have now, and give the flags back alone.
    """
    for own, past in list(_replaced(model)):
        for gone in [r for r in past if r.adapter in names]:
            at = past.index(gone)
            del past[at]
            if at < len(past):  # another file was loaded over it since
                past[at].trained = gone.trained
                past[at].value = past[at].value if keep else gone.value
                continue
            own.tensor.requires_grad_(gone.trained)
            if not keep:
                own.tensor.copy_(gone.value)
        if not past:
            del own.module.__dict__[_REPLACED][own.key]


def _replaced(model: nn.Module) -> Iterator[tuple[BaseParameter, list[Replaced]]]:
    """Every parameter that a file was loaded over, and what it was before each."""
    for name, module in named_modules(model):
        for key, past in module.__dict__.get(_REPLACED, {}).items():
            yield BaseParameter(dotted(name, key), module, key), past
