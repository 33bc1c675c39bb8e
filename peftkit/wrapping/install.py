"""Put adapters that are built on their sites: the module becomes an adapted one, the model is frozen."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed import get_world_size

from peftkit.adapters.base import Adapter
from peftkit.errors import MergeStateError, OptionError, UnsupportedLayerError, require_choice
from peftkit.kernels.sharding import sharded
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.classes import adapted_class, become_, expected_class
from peftkit.wrapping.extras import base_parameters
from peftkit.wrapping.layer import WEIGHT, Adapted
from peftkit.wrapping.replicated import replicate_, require_common
from peftkit.wrapping.roll import enrol
from peftkit.wrapping.routes import ROUTES
from peftkit.wrapping.sites import Site, Slot
from peftkit.wrapping.stacks import stacks
from peftkit.wrapping.state import AdapterState
from peftkit.wrapping.strength import require_strength
from peftkit.wrapping.vectors import slots
from peftkit.wrapping.walk import named_modules, unwrapped

#: where the places of parameters that required gradients before the first wrap are kept, until the model's last unwrap
TRAINABLE = "_peftkit_trainable"


def install(
    model: nn.Module,
    built: Sequence[tuple[Site, Adapter]],
    name: str,
    *,
    strength: float = 1.0,
    route: str = "auto",
    untie: Collection[str] = (),
) -> None:
    """Put adapters that are built and checked on their sites, and freeze the model if it has none yet.

    Args:
        model: the model of the sites.
        built: sites with their adapters.
        name: of the adapters.
        strength: λ.
        route: as in `wrap`.
        untie: names of sites whose shared parameter is replaced by a copy.
    """
    check_install([site for site, _ in built], strength, route)
    dropping = [site.name for site, adapter in built if route == "dense" and adapter.input_dropout]
    if dropping:
        raise OptionError(f"{dropping[0]}: dropout acts on the factored route only, and route='dense' was given")
    copied = [site.name for site, _ in built if site.name in untie and sharded(site.parameter)]
    if copied:
        raise UnsupportedLayerError(
            f"{copied[0]}: tied='untie' was given, and its weight is divided among processes (fully_shard), which "
            "would not divide a copy: wrap or load first, then shard"
        )
    require_averaged(model, "wrap or load")
    root = unwrapped(model)
    if TRAINABLE not in root.__dict__:
        nested = [own for _, module in named_modules(root) for own in module.__dict__.pop(TRAINABLE, ())]
        # By their places: sharding and hooks put other parameters there
        trainable = [own for own in base_parameters(model, every_name=True) if own.tensor.requires_grad]
        root.__dict__[TRAINABLE] = [*nested, *trainable]
        for own in trainable:
            own.tensor.requires_grad_(False)
    replicate_(dict.fromkeys(adapter for site, adapter in built if sharded(site.parameter)))
    for site, adapter in built:
        _attach(site, adapter, name, strength, route, site.name in untie)
    enrol(root, {site.module_name: cast(Adapted, site.module) for site, _ in built})


def require_averaged(model: nn.Module, doing: str) -> None:
    """Raise if a wrapper averages gradients over processes: of the parameters that it found when it was made."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and get_world_size(module.process_group) > 1:
            raise UnsupportedLayerError(
                "the model is inside DistributedDataParallel already, which would not average the gradients of its "
                f"adapters: {doing} first, then DistributedDataParallel(model)"
            )


def check_install(sites: Sequence[Site], strength: float, route: str) -> None:
    """Raise unless adapters can be installed on these sites now, at this strength and by this route."""
    require_strength(strength)
    require_choice("route", route, ROUTES)
    if torch.is_inference_mode_enabled():
        raise OptionError("adapters made inside torch.inference_mode() cannot train: wrap or load outside it")
    for site in sites:
        require_common(site.label, site.parameter)
        if route == "dense" and site.slot.base is not None:
            raise OptionError(
                f"{site.label}: route='dense' was given, and its weight is quantised ({site.slot.base.title}): that "
                "route would dequantise it at every call. Leave route out"
            )
        if isinstance(site.module, Adapted) and site.module.adapter_state.merged is not None:
            raise MergeStateError(f"{site.label} has merged adapters in its weight: restore before adding one")


def _copied(site: Site, shared: nn.Parameter) -> nn.Parameter:
    """A frozen copy of a parameter: of a quantised one with its scales, which its class copies."""
    if site.slot.base is None:
        return nn.Parameter(shared.detach().clone(), requires_grad=False)
    own = copy.deepcopy(shared)
    own.requires_grad_(False)
    return own


def _attach(site: Site, adapter: Adapter, name: str, strength: float, route: str, untie: bool) -> None:
    module = site.module
    if not isinstance(module, Adapted):
        become_(module, adapted_class(type(module), (), bool(stacks(module))))
        assert isinstance(module, Adapted)
        module.adapters = nn.ModuleDict()
        module.adapter_state = AdapterState(slots(module), ())
    host = module
    state = host.adapter_state
    if site.read:
        _read(host, site.slot)
    state.route = route
    if untie and site.slot.parameter not in state.tied:
        shared = cast(nn.Parameter, own_parameters(host)[site.slot.parameter])
        state.tied[site.slot.parameter] = shared
        own_parameters(host)[site.slot.parameter] = _copied(site, shared)
    adapter.train(host.training)
    _put(host, name, site.slot_name, adapter)
    state.strengths[name] = float(strength)
    state.refresh()


def _read(host: Adapted, slot: Slot) -> None:
    """Let what reads the slot's parameter get it with its adapters; of matrices, what reads any of them."""
    state = host.adapter_state
    if slot.parameter in state.reads:
        return
    matrices = [own.parameter for own in state.slots.values() if not own.geometry.vector]
    added = [slot.parameter] if slot.geometry.vector else matrices
    state.reads = tuple(dict.fromkeys([*state.reads, *added]))
    become_(host, expected_class(host))


def _put(host: Adapted, name: str, slot_name: str, adapter: Adapter) -> None:
    """Put an adapter into its module: as "<name>", or beside others of that name on the same module's weights."""
    if name not in host.adapters and not slot_name:
        host.adapters[name] = adapter
        return
    held = host.adapters[name] if name in host.adapters else nn.ModuleDict()
    if not isinstance(held, nn.ModuleDict):  # the weight's own, which was alone until now
        held = nn.ModuleDict({WEIGHT: held})
    held[slot_name or WEIGHT] = adapter
    host.adapters[name] = held
