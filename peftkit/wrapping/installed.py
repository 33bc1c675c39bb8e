"""The adapters that are on a model, weight by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.delta.base import Delta
from peftkit.errors import MergeStateError, UnknownAdapterError, UnsetAdapterError, did_you_mean
from peftkit.wrapping.hooks import present
from peftkit.wrapping.layer import WEIGHT, Adapted
from peftkit.wrapping.lookup import Lookup
from peftkit.wrapping.sites import Slot
from peftkit.wrapping.walk import dotted, named_modules


@dataclass(frozen=True, eq=False)
class InstalledAdapter:
    """An adapter where it is."""

    site: str
    name: str
    adapter: Adapter
    host: Adapted
    slot_name: str

    @property
    def slot(self) -> Slot:
        """The weight as part of its module."""
        return self.host.adapter_state.slots[self.slot_name]

    @property
    def key(self) -> str:
        """The adapter's name in its module, "adapters.<name>", with the weight's where several are of one name."""
        several = isinstance(self.host.adapters[self.name], nn.ModuleDict)
        return dotted("adapters", self.name, (self.slot_name or WEIGHT) if several else "")

    @property
    def looks_up(self) -> bool:
        """Whether the weight is an embedding's, whose input is numbers of rows."""
        return isinstance(self.slot.geometry, Lookup)

    @property
    def is_installed(self) -> bool:
        """Whether the adapter is still there."""
        return isinstance(self.host, Adapted) and self.host.adapter(self.name, self.slot_name) is self.adapter

    def put_(self, adapter: Adapter) -> None:
        """Put another adapter in its place, in the mode of the one that is there."""
        held, there = self.host.adapters[self.name], self.host.adapter(self.name, self.slot_name)
        adapter.train(self.host.training if there is None else there.training)
        if isinstance(held, nn.ModuleDict):
            held[self.slot_name or WEIGHT] = adapter
        else:
            self.host.adapters[self.name] = adapter
        self.host.adapter_state.refresh()

    def require_unmerged(self, doing: str) -> None:
        """Raise MergeStateError if the adapter is merged into its weight."""
        merged = self.host.adapter_state.merged
        if merged is not None and self.name in merged.names:
            raise MergeStateError(f"{self.name} is merged into {self.site or 'the model'}: restore before {doing}")

    def require_values(self, *, written: bool = False) -> None:
        """Raise UnsetAdapterError if the adapter, or the weight it is on, has no values.

        written: the weight is to be written to, so that values which a hook loads for each call will not do.
        """
        self.adapter.require_values()
        self.require_loaded()
        weight = [self.host.parameter_of(self.slot)] if written else []
        if any(tensor.is_meta for tensor in (*self.adapter.state_dict().values(), *weight)):
            raise UnsetAdapterError(
                f"{self.site or 'the model'}: {'its weight' if written else 'its adapter'} is offloaded by hooks of "
                "accelerate: take the hooks off first (accelerate.hooks.remove_hook_from_submodules)"
            )

    def require_loaded(self) -> None:
        """Raise UnsetAdapterError if the weight that the adapter is on has no values."""
        if self.host.parameter_of(self.slot).is_meta and (self.slot.base is not None or self.base.is_meta):
            raise UnsetAdapterError(
                f"{self.site or 'the model'}: its weight is on the meta device: it is not loaded. Load it first"
            )

    def change(self, base: Tensor | None = None) -> Delta:
        """ΔW at strength 1 as it is outside of training, whatever mode the adapter is in.

        base: W (m, n) where it is at hand; by default `self.base`.
        """
        training = self.adapter.training
        self.adapter.eval()
        try:
            return self.adapter(self.base if base is None else base, 1.0)
        finally:
            self.adapter.train(training)

    @property
    def strength(self) -> float:
        """λ, whether or not the adapter acts now."""
        return self.host.adapter_state.strengths[self.name]

    @property
    def base(self) -> Tensor:
        """W (m, n), without what is merged into it, also where a hook keeps it until the layer is called."""
        if self.slot.base is None and self.host.parameter_of(self.slot).is_meta:
            weight = present(self.host, self.slot.parameter)
            assert weight is not None
            return self.slot.geometry.matrix(self.slot.of(weight))
        return self.host.base_of(self.slot_name).detach()


def other_places(model: nn.Module, name: str) -> dict[str, tuple[str, bool]]:
    """The further places of adapters that are shared -> the first place of each, and whether it is an embedding's."""
    first: dict[int, str] = {}
    found: dict[str, tuple[str, bool]] = {}
    for at in installed_adapters(model, [name], every_place=True):
        own = first.setdefault(id(at.adapter), at.site)
        if own != at.site:
            found[at.site] = own, at.looks_up
    return found


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """Every adapted module of the model, by its name."""
    return {name: module for name, module in named_modules(model) if isinstance(module, Adapted)}


def installed_adapters(
    model: nn.Module, names: Sequence[str] | None = None, *, every_place: bool = False
) -> Iterator[InstalledAdapter]:
    """The adapters of these names, or all, weight by weight; one that is shared comes once, or at every place."""
    seen: set[int] = set()
    for host_name, host in adapted_modules(model).items():
        for slot_name in host.adapter_state.slots:
            for name in host.adapters:
                adapter = host.adapter(name, slot_name)
                if (
                    adapter is not None
                    and (names is None or name in names)
                    and (every_place or id(adapter) not in seen)
                ):
                    seen.add(id(adapter))
                    yield InstalledAdapter(dotted(host_name, slot_name), name, adapter, host, slot_name)


class InstalledPart(NamedTuple):
    """An adapter, or one inside it, where it is.

    Attributes:
        place: "<weight>[<adapter>]", and the name in the adapter behind it of one inside.
        adapter: the part.
        at: the adapter that it is, or is inside of.
    """

    place: str
    adapter: Adapter
    at: InstalledAdapter


def installed_parts(model: nn.Module, name: str | None = None) -> Iterator[InstalledPart]:
    """The adapters of that name, or all, and those inside them."""
    for at in installed_adapters(model, names_of(model, name)):
        for inner, part in at.adapter.parts():
            yield InstalledPart(dotted(f"{at.site}[{at.name}]", inner), part, at)


def names_of(model: nn.Module, name: str | None = None) -> tuple[str, ...]:
    """The adapters on the model: all, or just `name` after making sure it is there."""
    known = list(dict.fromkeys(own for host in adapted_modules(model).values() for own in host.adapters))
    if not known:
        raise UnknownAdapterError("there is no adapter on this model: call wrap or load first")
    if name is None:
        return tuple(known)
    if name not in known:
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        raise UnknownAdapterError(f"no adapter on this model is called {name!r}; there is {', '.join(known)}.{hint}")
    return (name,)


def one_name(model: nn.Module, name: str | None = None) -> str:
    """`name`, or that of the only adapter on the model."""
    names = names_of(model, name)
    if len(names) > 1:
        raise UnknownAdapterError(f"this model has the adapters {', '.join(names)}: say which by name=")
    return next(iter(names))
