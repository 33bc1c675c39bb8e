"""Stand-ins: other adapters in the places of some for one pass over data, after which the model is as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.errors import OptionError, UnsupportedLayerError
from peftkit.kernels.sharding import sharded
from peftkit.kernels.torch_private import own_buffers
from peftkit.wrapping.install import require_averaged
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters
from peftkit.wrapping.stacks import StackGeometry

StandIn = TypeVar("StandIn", bound=Adapter)


@contextmanager
def standing_in(
    model: nn.Module, found: Sequence[InstalledAdapter], make: Callable[[int, InstalledAdapter], StandIn]
) -> Iterator[list[StandIn]]:
    """Put another adapter in the place of each of some, wherever it is, and leave gradients and statistics as they are.

    Raises:
        OptionError: an adapter does not act, or nothing has gradients here.
        MergeStateError: an adapter is merged.
        UnsetAdapterError: an adapter or its weight has no values.
        UnsupportedLayerError: the model is inside DistributedDataParallel.
    """
    require_averaged(model, "look at its gradients")
    for at in found:
        _require_acts(at)
    places = everywhere(model, found)
    made = [make(index, at) for index, at in enumerate(found)]
    with kept(model), torch.enable_grad():
        try:
            for other, own in zip(made, places, strict=True):
                for place in own:
                    place.put_(other)
            yield made
        finally:
            for at, own in zip(found, places, strict=True):
                for place in own:
                    place.put_(at.adapter)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a model have gradients, but those of adapters that stand in."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def add_up(
    model: nn.Module,
    batches: Iterable[Any],
    backward: Callable[[nn.Module, Any], object],
    parameters: Sequence[nn.Parameter],
) -> None:
    """Leave the gradients of parameters summed over batches, also where `backward` zeroes those of the model."""
    sums = {parameter: parameter.grad for parameter in parameters}
    for parameter in sums:
        parameter.grad = None
    for batch in batches:
        backward(model, batch)
        for parameter, before in sums.items():
            if parameter.grad is not None:
                sums[parameter] = parameter.grad if before is None else before + parameter.grad
                parameter.grad = None
    for parameter, total in sums.items():
        parameter.grad = total


def everywhere(model: nn.Module, found: Sequence[InstalledAdapter]) -> list[list[InstalledAdapter]]:
    """Return all places of each adapter, which are several where layers share it."""
    places: dict[int, list[InstalledAdapter]] = {id(at.adapter): [] for at in found}
    for at in installed_adapters(model, every_place=True):
        places.get(id(at.adapter), []).append(at)
    return [places[id(at.adapter)] for at in found]


def _require_acts(at: InstalledAdapter) -> None:
    """Raise unless a loss can have gradients at an adapter's place."""
    where = at.site or "the model"
    at.require_unmerged("looking at its weight")
    at.require_values()
    if at.name not in at.host.adapter_state.now().strengths:
        raise OptionError(
            f"{where}: {at.name} does not act, as its strength is 0 or a block disables it, so that no gradient comes "
            "to it: call it outside of the block, or set_strength first"
        )
    require_gradients()


def require_matrices(found: Sequence[InstalledAdapter]) -> None:
    """Raise OptionError if a weight is a stack of matrices."""
    stack = next((at for at in found if isinstance(at.slot.geometry, StackGeometry)), None)
    if stack is not None:
        raise OptionError(
            f"{stack.site or 'the model'} is a stack of experts, and weights of one matrix are looked at: leave it out"
        )


def require_whole(found: Sequence[InstalledAdapter], doing: str) -> None:
    """Raise UnsupportedLayerError if an adapter is divided among processes."""
    divided = next((at for at in found if any(map(sharded, at.adapter.state_dict().values()))), None)
    if divided is not None:
        raise UnsupportedLayerError(
            f"{divided.site or 'the model'} is divided among processes (fully_shard): {doing} before"
        )


def require_gradients() -> None:
    """Raise OptionError inside torch.inference_mode()."""
    if torch.is_inference_mode_enabled():
        raise OptionError("inside torch.inference_mode() nothing has gradients: call it outside")


def require_function(backward: object) -> None:
    """Raise OptionError unless something can be called."""
    if not callable(backward):
        raise OptionError(
            f"backward={backward!r} was given, and the gradients of a loss are needed: pass a function of the model "
            "and a batch that calls backward() of the loss"
        )


#: what to do about gradients and inputs that are not finite
_LOOK = "look at the batches and the loss, and where a GradScaler is used, begin with a smaller scale"


def require_finite(at: InstalledAdapter, what: str, found: Sequence[Tensor] | float, instead: str = _LOOK) -> None:
    """Raise OptionError if something that was seen of a weight is infinite or no number."""
    finite = math.isfinite(found) if isinstance(found, (float, int)) else all(bool(t.isfinite().all()) for t in found)
    if not finite:
        raise OptionError(f"{at.site or 'the model'}: {what} is not finite: {instead}")


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Keep gradients, and the statistics that norms gather, as they are: both are put back afterwards."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    statistics = [(t, t.clone()) for norm in norms for t in own_buffers(norm).values() if t is not None]
    try:
        for parameter in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in gradients.items():
            parameter.grad = grad
        with torch.no_grad():
            for own, before in statistics:
                own.copy_(before)
