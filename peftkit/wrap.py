"""The adapted layer: wrap, unwrap, strength, enable and disable.

A module keeps its identity: its class becomes a subclass made once per class, as torch's own parametrize and FSDP2
do. Its `weight`, its place in the model, references to it, its hooks and its state_dict keys stay what they were.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftkit import registry
from peftkit.adapter import Adapter
from peftkit.delta import Delta
from peftkit.errors import MergeStateError, OptionError, UnknownAdapterError, near
from peftkit.plan import Plan, Rule, plan
from peftkit.routes import ROUTES, choose
from peftkit.sites import Site, Slot, slots
from peftkit.snapshot import Merged

# The names of the parameters that required gradients before the first wrap, kept on the model until the last unwrap
_TRAINABLE = "_peftkit_trainable"


@dataclass(eq=False)
class Adaptation:
    """What an adapted module knows besides its parameters: plain data, so it is copied and pickled with the module."""

    slots: dict[str, Slot]
    reads: tuple[str, ...]
    route: str = "auto"
    #: name -> λ as a 0-d float64 CPU tensor: data, not code, to torch.compile
    strengths: dict[str, Tensor] = field(default_factory=dict)
    #: name -> how many `disabled` or `enabled` blocks hide it
    hidden: dict[str, int] = field(default_factory=dict)
    #: adapters that are in the weight now, and how to get the weight back
    merged: Merged | None = None
    #: parameter name -> the shared parameter that `tied="untie"` replaced by a copy
    tied: dict[str, nn.Parameter] = field(default_factory=dict)
    #: the names that act in forward: not hidden, not merged, of a strength other than 0
    acting: tuple[str, ...] = ()

    def refresh(self) -> None:
        merged = () if self.merged is None else self.merged.names
        self.acting = tuple(
            name
            for name, strength in self.strengths.items()
            if not self.hidden[name] and name not in merged and strength.item() != 0
        )


class Adapted(nn.Module):
    """Mixed into the class of an adapted module. `adapters.<name>` is an Adapter, or one per projection."""

    adapters: nn.ModuleDict
    adaptation: Adaptation

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (base_class(self), self.adaptation.reads), self.__dict__.copy()


class AdaptedCall(Adapted):
    """An adapted layer that is called: its output with every acting adapter's."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input: whatever the layer takes."""
        state = self.adaptation
        if not state.acting:
            return super().forward(input, *args, **kwargs)
        slot = state.slots[""]
        g = slot.geometry.sized_for(self, input, *args, **kwargs) if args or kwargs else slot.geometry
        weight, bias = cast(Tensor, self._parameters["weight"]), self._parameters["bias"]
        W = base = g.matrix(weight)
        acting = [cast(Adapter, self.adapters[name]) for name in state.acting]
        beside = state.merged is not None and any(a.reads_base for a in acting)
        if (
            state.merged is not None and beside
        ):  # ΔW is a function of the base, which the weight is not while others are merged into it
            base = g.matrix(state.merged.original("", weight))
        deltas = [a(base, state.strengths[name]) for a, name in zip(acting, state.acting, strict=True)]
        drops = [a.input_dropout if self.training else 0.0 for a in acting]
        device = input.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        narrow = compute.itemsize < 4
        route = state.route
        if beside:
            route = "dense"
        elif any(drops):
            route = "factored"
        elif route == "auto":
            route = choose(deltas, g.shape, g.outputs(input), torch.is_grad_enabled(), narrow)
        if route == "dense":
            if any(drops):
                raise MergeStateError(
                    "input dropout cannot act beside merged adapters on a layer whose other adapters read the base: "
                    "restore before training, or call eval()"
                )
            if narrow:
                return super().forward(input, *args, **kwargs) + _recomputed(lambda x: g.run(x, _total(deltas)), input)
            return _recomputed(lambda x: g.run(x, W + _total(deltas), bias), input)
        y = super().forward(input, *args, **kwargs)
        wx = None
        if any(d.reads_output for d in deltas):
            wx = y if bias is None else y - g.per_channel(bias.to(y.dtype))
        out = y
        for delta, p in zip(deltas, drops, strict=True):
            x = F.dropout(input, p) if p else input
            out = out + delta.apply(x, wx, g).to(y.dtype)
        return out


class AdaptedRead(Adapted):
    """An adapted module whose weights are read, not called: reading one gives W + ΔW."""

    def effective(self, parameter_name: str) -> Tensor:
        """The parameter with every acting adapter's ΔW, in the parameter's dtype and shape."""
        state = self.adaptation
        parameter = cast(Tensor, self._parameters[parameter_name])
        if not state.acting:
            return parameter
        parts, end = [], 0
        for slot_name, slot in state.slots.items():
            if slot.parameter != parameter_name:
                continue
            own = slot.of(parameter)
            base = own if state.merged is None else state.merged.original(slot_name, own)
            W = slot.geometry.matrix(base)
            deltas = [
                adapter(W, state.strengths[name])
                for name in state.acting
                if (adapter := adapter_at(self, name, slot_name)) is not None
            ]
            total = slot.geometry.weight(_total(deltas)) if deltas else torch.zeros_like(own)
            parts.append((own + total).to(own.dtype))
            end += parts[-1].shape[0]
        if len(parts) == 1 and end == parameter.shape[0]:
            return parts[0]
        return torch.cat([*parts, parameter[end:]])


def _total(deltas: Sequence[Delta]) -> Tensor:
    """Σ ΔW (m, n), outside autocast: the sum is formed in the precision of the factors."""
    with torch.autocast(deltas[0].device.type, enabled=False):
        total = deltas[0].dense()
        for delta in deltas[1:]:
            total = total + delta.dense()
    return total


def _recomputed(function: Any, x: Tensor) -> Tensor:
    """function(x), with what it builds thrown away and built again for backward."""
    if not torch.is_grad_enabled():
        return function(x)
    return cast(Tensor, checkpoint(function, x, use_reentrant=False, preserve_rng_state=False))


@functools.cache
def adapted_class(base: type[nn.Module], reads: tuple[str, ...] = ()) -> type[Adapted]:
    """The subclass of `base` whose instances are adapted; `reads` names parameters to adapt where they are read."""
    if not reads:
        return type(f"Adapted{base.__name__}", (AdaptedCall, base), {"__module__": __name__})
    properties = {name: property(lambda self, name=name: self.effective(name)) for name in reads}
    return type(f"Adapted{base.__name__}", (AdaptedRead, base), {**properties, "__module__": __name__})


def base_class(module: Adapted) -> type[nn.Module]:
    """The class the module had before it was adapted."""
    return next(c for c in type(module).__mro__ if not issubclass(c, Adapted))


def _new(base: type[nn.Module], reads: tuple[str, ...]) -> Adapted:
    cls = adapted_class(base, reads)
    return cls.__new__(cls)


# -- looking at what is there ---------------------------------------------------------------------------------------


def hosts(model: nn.Module) -> dict[str, Adapted]:
    """Every adapted module of the model, by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def adapter_at(host: Adapted, name: str, slot: str) -> Adapter | None:
    """The adapter called `name` on one weight of the host, if there is one."""
    held = host.adapters._modules.get(name)
    if held is None or isinstance(held, Adapter):
        return held if not slot else None
    return cast("Adapter | None", held._modules.get(slot))


def adapters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, str, Adapter, Adapted, Slot]]:
    """(site, adapter name, adapter, host, slot) for every adapter, or those called `name`."""
    for host_name, host in hosts(model).items():
        for slot_name, slot in host.adaptation.slots.items():
            site = ".".join(part for part in (host_name, slot_name) if part)
            for own in host.adapters:
                adapter = adapter_at(host, own, slot_name)
                if adapter is not None and name in (None, own):
                    yield site, own, adapter, host, slot


def names_of(model: nn.Module, name: str | None = None) -> tuple[str, ...]:
    """The adapters on the model: all, or just `name` after making sure it is there."""
    known = list(dict.fromkeys(own for host in hosts(model).values() for own in host.adapters))
    if not known:
        raise UnknownAdapterError("there is no adapter on this model: call wrap or load first")
    if name is None:
        return tuple(known)
    if name not in known:
        raise UnknownAdapterError(
            f"no adapter on this model is called {name!r}; there is {', '.join(known)}.{near(name, known)}"
        )
    return (name,)


def one_name(model: nn.Module, name: str | None = None) -> str:
    """`name`, or that of the only adapter on the model."""
    names = names_of(model, name)
    if len(names) > 1:
        raise UnknownAdapterError(f"this model has the adapters {', '.join(names)}: say which by name=")
    return next(iter(names))


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The trainable parameters of all adapters, or of one: what an optimiser takes."""
    names = names_of(model, name)
    found = (p for _, own, a, _, _ in adapters(model) if own in names for p in a.parameters() if p.requires_grad)
    return list(dict.fromkeys(found))


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """{site.parameter: tensor} of one adapter; `name` may be left out where there is only one."""
    return {
        f"{site}.{key}".lstrip("."): tensor
        for site, _, adapter, _, _ in adapters(model, one_name(model, name))
        for key, tensor in adapter.state_dict().items()
    }


# -- changing it ----------------------------------------------------------------------------------------------------


def wrap(
    model: nn.Module,
    kind: str | None = None,
    *,
    targets: str | Sequence[str] = "full",
    exclude: str | Sequence[str] = (),
    rules: Sequence[Rule] | None = None,
    name: str = "default",
    route: str = "auto",
    tied: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Plan:
    """Put an adapter on every targeted layer and freeze the rest. See `plan` for targets and what raises.

    The model computes what it computed before, bit for bit, until the adapters are trained. Nothing is changed if
    anything raises. The first wrap freezes the whole model; make a new head trainable after it.
    route: "auto" chooses per call between the factored and the dense route; naming one pins it.
    """
    if route not in ROUTES:
        raise OptionError(f"route={route!r} was given, one of {', '.join(map(repr, ROUTES))} was expected")
    planned = plan(
        model, kind, targets=targets, exclude=exclude, rules=rules, name=name, tied=tied, dtype=dtype, **options
    )
    built: list[tuple[Site, Adapter]] = []
    for entry in planned.entries:
        matrix = entry.site.matrix.detach()
        shape = entry.site.slot.geometry.shape
        built.append((entry.site, registry.build(entry.kind, shape, matrix, dtype, **entry.options)))
    install(model, built, name, route=route, untie=planned.untie)
    return planned


def install(
    model: nn.Module,
    built: Sequence[tuple[Site, Adapter]],
    name: str,
    *,
    strength: float = 1.0,
    route: str = "auto",
    untie: Collection[str] = (),
) -> None:
    """Put adapters that are built and checked on their sites, and freeze the model if it has none yet."""
    busy = [site.name for site, _ in built if isinstance(site.module, Adapted) and site.module.adaptation.merged]
    if busy:
        raise MergeStateError(f"{busy[0]} has merged adapters in its weight: restore before adding one")
    if _TRAINABLE not in model.__dict__:
        trainable = [key for key, p in model.named_parameters() if p.requires_grad and not _is_adapters(model, key)]
        model.__dict__[_TRAINABLE] = trainable
        for key in trainable:
            model.get_parameter(key).requires_grad_(False)
    for site, adapter in built:
        _attach(site, adapter, name, strength, route, site.name in untie)


def _is_adapters(model: nn.Module, key: str) -> bool:
    """Whether a parameter belongs to an adapter that a wrap of an inner module put there."""
    parts = key.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:end])), Adapter) for end in range(1, len(parts)))


def _attach(site: Site, adapter: Adapter, name: str, strength: float, route: str, untie: bool) -> None:
    module = site.module
    if not isinstance(module, Adapted):
        own = slots(module)
        reads = tuple(dict.fromkeys(slot.parameter for slot in own.values())) if site.read else ()
        base = type(module)
        module.__class__ = adapted_class(base, reads)
        assert isinstance(module, Adapted)
        module.adapters = nn.ModuleDict()
        module.adaptation = Adaptation(own, reads)
    host = module
    state = host.adaptation
    state.route = route
    if untie and site.slot.parameter not in state.tied:
        shared = cast(nn.Parameter, host._parameters[site.slot.parameter])
        state.tied[site.slot.parameter] = shared
        host._parameters[site.slot.parameter] = nn.Parameter(shared.detach().clone(), requires_grad=False)
    adapter.train(host.training)
    if site.slot_name:
        if name not in host.adapters:
            host.adapters[name] = nn.ModuleDict()
        cast(nn.ModuleDict, host.adapters[name])[site.slot_name] = adapter
    else:
        host.adapters[name] = adapter
    state.strengths[name] = torch.tensor(strength, dtype=torch.float64)
    state.hidden.setdefault(name, 0)
    state.refresh()


def unwrap(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> tuple[str, ...]:
    """Take one adapter, or all, off the model; returns the names of the layers it was on.

    The last to go gives back the very modules there were, with the gradients flags they had. keep_merged: leave
    merged weights as they are instead of raising, which bakes the adapters in.
    """
    names = names_of(model, name)
    for host_name, host in hosts(model).items():
        merged = host.adaptation.merged
        if merged is not None and set(merged.names) & set(names):
            if not keep_merged:
                raise MergeStateError(
                    f"{', '.join(merged.names)} is merged into {host_name or 'the model'}: restore(model) first, "
                    "or pass keep_merged=True to leave it in the weights"
                )
            if set(merged.names) - set(names):
                raise MergeStateError(
                    f"{', '.join(merged.names)} are merged together into {host_name}: "
                    "unwrap them together, or restore first"
                )
    touched: list[str] = []
    for host_name, host in hosts(model).items():
        gone = [own for own in names if own in host.adapters]
        if gone:
            touched.append(host_name)
        for own in gone:
            del host.adapters[own], host.adaptation.strengths[own], host.adaptation.hidden[own]
        state = host.adaptation
        if state.merged is not None and not set(state.merged.names) & set(host.adapters):
            state.merged = None
            baked = True
        else:
            baked = False
        state.refresh()
        if not len(host.adapters):
            _detach(host, baked)
    if not hosts(model):
        for key in model.__dict__.pop(_TRAINABLE, ()):
            model.get_parameter(key).requires_grad_(True)
    return tuple(touched)


def _detach(host: Adapted, baked: bool) -> None:
    state = host.adaptation
    if not baked:  # a merged copy stays untied: the shared weight never had the adapter in it
        host._parameters.update(state.tied)
    del host.adapters, host.adaptation
    cast(nn.Module, host).__class__ = base_class(host)


def set_strength(model: nn.Module, strength: float, name: str | None = None) -> None:
    """λ of one adapter, or of all: the layer's weight is W + λ·ΔW. Any finite number; 0 is the base itself."""
    if not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise OptionError(f"strength={strength!r} was given, a finite number was expected")
    names = names_of(model, name)
    for host_name, host in hosts(model).items():
        merged = host.adaptation.merged
        stuck = [own for own in names if merged is not None and own in merged.names]
        if stuck:
            raise MergeStateError(
                f"{stuck[0]} is merged into {host_name or 'the model'}: restore before changing its strength"
            )
    for host in hosts(model).values():
        for own in names:
            if own in host.adaptation.strengths:
                host.adaptation.strengths[own].fill_(strength)
        host.adaptation.refresh()


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Inside, one adapter, or all, does not act. Blocks may nest, and an exception leaves nothing disabled."""
    with _hidden(model, names_of(model, name)):
        yield


@contextmanager
def enabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Inside, only these adapters act. Blocks may nest with each other and with `disabled`."""
    known = names_of(model)
    for name in names:
        names_of(model, name)
    with _hidden(model, [name for name in known if name not in names]):
        yield


@contextmanager
def _hidden(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    affected = [(host.adaptation, own) for host in hosts(model).values() for own in names if own in host.adapters]
    for state, own in affected:
        if state.merged is not None and own in state.merged.names:
            raise MergeStateError(f"{own} is merged into the weights: restore before disabling it")
    for state, own in affected:
        state.hidden[own] += 1
        state.refresh()
    try:
        yield
    finally:
        for state, own in affected:
            if own in state.hidden:  # it may have been unwrapped inside the block
                state.hidden[own] -= 1
                state.refresh()


@torch.no_grad()
def project_(model: nn.Module, name: str | None = None) -> None:
    """Move every adapter into the set it allows (LoLDU's ‖ΔW‖ ≤ epsilon), after an optimiser step.

    optimizer.register_step_post_hook(lambda *_: peftkit.project_(model))
    """
    names = names_of(model, name)
    for _, own, adapter, host, slot in adapters(model):
        if own in names:
            adapter.project_(slot.geometry.matrix(slot.of(cast(Tensor, host._parameters[slot.parameter]))))
