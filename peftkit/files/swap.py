"""Another file in the place of an adapter: new numbers in the tensors that the model, and compiled code of it, hold."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.errors import MergeStateError, MismatchError, UnsupportedLayerError, error_context
from peftkit.files.build import made
from peftkit.files.component import of_component
from peftkit.files.extras import PlacedExtras, placed
from peftkit.files.load import LoadReport, compared, paths_in, with_extras
from peftkit.files.read import Reading, read
from peftkit.files.trees import at_home
from peftkit.kernels.sharding import sharded
from peftkit.wrapping.divided import require_not_empty
from peftkit.wrapping.extras import give_back_, replace_, require_returnable, require_unmerged
from peftkit.wrapping.in_common import places
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, one_name
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.vectors import every_site
from peftkit.wrapping.walk import dotted

if TYPE_CHECKING:
    from typing_extensions import Unpack


@of_models
def swap(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    other_base: bool = False,
    component: str | None = None,
    extras: bool = True,
    **reading: Unpack[Reading],
) -> LoadReport:
    """Put the numbers of another file into an adapter that is on the model, in place: nothing is compiled again.

    The file is of the same kind on the same weights. Its rank may be smaller: the factors are followed by zeros, which
    is the same ΔW. Another α goes into the factors, rounded once. Parameters, strength, route and dropout stay what
    they are, and so do the moments of an optimiser, which are of the adapter that was there.

    Nothing is changed if anything raises.

    Args:
        model: a wrapped model.
        path: a file or folder, as in `load`.
        name: of the adapter on the model; may be left out where there is only one.
        other_base: accept a base that is not the one the file was trained on.
        component: which part of a pipeline the model is, as in `load`.
        extras: False leaves the parameters that trained beside the file's adapters as they are on the model.
        **reading: as in `read`.

    Returns:
        What was loaded.

    Raises:
        MismatchError: the file has another kind, other weights, other options or a larger rank than the adapter on the
            model: unwrap that one and load the file.
        WrongBaseError: a model that is not the base the file was trained on.
        MergeStateError: an adapter is merged into a weight: restore first.
        UnsupportedLayerError: the adapter is divided among processes.
        UnknownAdapterError: there is no adapter of that name, or several and none is named.
        FileError: a file that is no adapter file, or is damaged.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full", name="style")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "first.safetensors")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.25)
        >>> pk.swap(model, path).loaded
        ('0',)
        >>> pk.adapter_parameters(model)[0].max().item()
        0.5
    """
    name = one_name(model, name)
    bundle = read(path, **reading)
    with error_context(path):
        require_not_empty(model)
        here = {at.site: at for at in installed_adapters(model, [name])}
        _require_writable(here.values())
        ours = every_site(model)
        bundle = at_home(of_component(bundle, component, ours), paths_in(model, ours), path)
        fitting, distances, report = compared(path, name, bundle, ours, component)
        beside = placed(bundle, model) if extras else PlacedExtras()
        report = with_extras(report, bundle, beside, extras)
        if not report.complete:
            raise MismatchError(f"{path} does not fit this model\n{report}")
        fitting = [(site, patch) for site, patch in fitting if not patch.same_as]
        _require_same_weights(path, name, here, [site.name for site, _ in fitting])
        require_unmerged(beside.values)
        require_returnable(model, [name], keep=False)
        built = made(path, fitting, bundle, beside, distances, extras, other_base)
        numbers = [(here[site.name], _numbers(path, here[site.name], adapter)) for site, adapter in built]
        _require_agreeing(path, numbers)
        _write_(numbers)
        give_back_(model, [name], keep=False)
        replace_(beside.values, name)
        return report


@torch.no_grad()
def _write_(numbers: Sequence[tuple[InstalledAdapter, Mapping[str, Tensor]]]) -> None:
    """Write tensors over those of the adapters, whose parameters stay the objects that they are."""
    for at, tensors in numbers:
        for key, tensor in at.adapter.state_dict().items():
            tensor.copy_(tensors[key])
        at.adapter.refresh_parts_()


def _require_agreeing(path: object, numbers: Sequence[tuple[InstalledAdapter, Mapping[str, Tensor]]]) -> None:
    """Raise where adapters on the model share a parameter, and those of the file have different numbers for it."""
    new = {at.site: tensors for at, tensors in numbers}
    for (first, key), *others in places(at for at, _ in numbers).values():
        for site, name in others:
            if not torch.equal(new[site][name], new[first][key]):
                raise MismatchError(
                    f"{path} has other numbers for {dotted(site, name)} than for {dotted(first, key)}, which are one "
                    f"parameter on the model{_ADVICE}"
                )


def _require_writable(installed: Collection[InstalledAdapter]) -> None:
    """Raise where an adapter has no numbers of its own to write over, or a weight is not the base's."""
    for at in installed:
        at.require_values()
        if any(sharded(tensor) for tensor in at.adapter.state_dict().values()):
            raise UnsupportedLayerError(
                f"{at.site}[{at.name}] is divided among processes (fully_shard): swap before, or load the file's "
                "numbers by torch.distributed.checkpoint.state_dict"
            )
        if at.host.adapter_state.merged is not None:
            merged = ", ".join(at.host.adapter_state.merged.names)
            raise MergeStateError(f"{merged} is merged into {at.site}: restore before swapping")


def _require_same_weights(
    path: object, name: str, here: Mapping[str, InstalledAdapter], found: Collection[str]
) -> None:
    """Raise unless the file adapts the weights that the adapter is on, and no others."""
    lacking, more = sorted(set(here) - set(found)), sorted(set(found) - set(here))
    if lacking or more:
        what = [f"it has nothing for {_named(lacking)}"] if lacking else []
        what += [f"{name!r} is not on {_named(more)}"] if more else []
        raise MismatchError(
            f"{path} is of other weights than the adapter {name!r} on this model: {' and '.join(what)}. "
            f"pk.unwrap(model, {name!r}) and load it"
        )


def _numbers(path: object, at: InstalledAdapter, new: Adapter) -> dict[str, Tensor]:
    """The tensors that make the adapter on the model what the file's is, in its shapes and dtypes."""
    where, old = f"{path}: {at.site}", at.adapter
    own, given = old.state_dict(), {key: tensor.detach() for key, tensor in new.state_dict().items()}
    if type(old) is not type(new) or set(own) != set(given):
        raise MismatchError(f"{where} is {_described(new)} in the file, {_described(old)} on the model{_ADVICE}")
    free = {option for _, inner in old.parts() for option in inner.resizable}
    unlike = [o for o, value in new.options.items() if o not in free and old.options.get(o) != value]
    if unlike:
        raise MismatchError(
            f"{where}: {unlike[0]}={new.options[unlike[0]]!r} in the file, {old.options.get(unlike[0])!r} on the "
            f"model{_ADVICE}"
        )
    for prefix, inner in new.parts():
        gamma, of_model = _gamma(inner), _gamma(old.get_submodule(prefix))
        for full in (dotted(prefix, key) for key in inner.scaling_parameters if gamma != of_model):
            if full in given:
                given[full] = given[full] * (gamma / of_model if of_model else math.inf)
    return {key: _fitted(f"{where}: {key}", given[key], own[key]) for key in own}


def _named(weights: Sequence[str]) -> str:
    """The first of some weights, for a message."""
    first = [site or "the model" for site in weights[:3]]
    return ", ".join(first) + (f" and {len(weights) - 3} more" if len(weights) > 3 else "")


_ADVICE = ": unwrap that adapter and load the file"


def _gamma(adapter: nn.Module) -> float:
    """γ, of kinds that have one."""
    scale = getattr(adapter, "scale", 1.0)
    return scale if isinstance(scale, float) else 1.0


def _fitted(where: str, tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor followed by zeros up to the shape of another, in its dtype."""
    short = [there - here for here, there in zip(tensor.shape, like.shape, strict=True)]
    if min(short, default=0) < 0:
        raise MismatchError(f"{where} is {tuple(tensor.shape)} in the file, {tuple(like.shape)} on the model{_ADVICE}")
    fitted = F.pad(tensor, [n for missing in reversed(short) for n in (0, missing)]) if any(short) else tensor
    cast = fitted.to(like.device, like.dtype)
    if not torch.isfinite(cast).all():
        raise MismatchError(f"{where} is not finite as {like.dtype}, which the adapter on the model has{_ADVICE}")
    return cast


def _described(adapter: Adapter) -> str:
    return f"{adapter.kind}({adapter.extra_repr()})"
