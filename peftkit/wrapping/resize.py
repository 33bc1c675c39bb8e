"""resize_: other ranks for adapters that are on a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter
from peftkit.delta import LowRank
from peftkit.delta.truncation import Keep, truncate
from peftkit.errors import (
    OptionError,
    TargetError,
    UnsupportedLayerError,
    did_you_mean,
    require_integer,
)
from peftkit.kernels.sharding import sharded
from peftkit.wrapping.install import require_averaged
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, one_name
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.wrap import take_off


@of_models
def resize_(model: nn.Module, ranks: Mapping[str, int], *, name: str | None = None) -> dict[str, tuple[int, int]]:
    """Give adapters on a model other ranks, in place, with γ as it is: 0 takes an adapter off its weight.

    Before training every kind with a rank of its own can be resized. Of trained adapters, ΔW stays where ranks are
    added; where some are taken away, `lora` keeps the best approximation of ΔW, and kinds with gates, as `svdlora`,
    keep the ranks with the largest part of ΔW, so that ranks whose gate is 0 go without a change. The parameters are
    new ones: make the optimiser after it, or anew.

    Args:
        model: a wrapped model.
        ranks: weight -> its new rank; the others stay as they are.
        name: of the adapter; may be left out where there is only one.

    Returns:
        Weight -> its rank before and after, of those whose rank changed; min(m, n) of a kind without a rank.

    Raises:
        TargetError: there is no adapter of that name on a weight, or every adapter would go.
        OptionError: the kind has no rank and is not taken off, shares it with other layers, cannot have that one, or
            cannot have another once it is trained.
        MergeStateError: the adapter is merged into a weight: restore first.
        UnsupportedLayerError: the adapter is divided among processes: resize before fully_shard; or the model
            is inside DistributedDataParallel: resize before.
        UnknownAdapterError: there is no adapter of that name, or several and none is named.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=4)
        >>> pk.resize_(model, {"0": 6, "1": 0})
        {'0': (4, 6), '1': (4, 0)}
    """
    if not isinstance(ranks, Mapping):
        raise OptionError(f"ranks={ranks!r} was given, a rank for each weight was expected, as {{'0': 4}}")
    require_averaged(model, "resize")
    name = one_name(model, name)
    places: dict[int, list[InstalledAdapter]] = {}
    for at in installed_adapters(model, [name], every_place=True):
        places.setdefault(id(at.adapter), []).append(at)
    found = {own[0].site: own for own in places.values()}
    for site, rank in ranks.items():
        if site not in found:
            raise TargetError(f"{name} is not on {site!r}, which ranks has.{did_you_mean(site, list(found))}")
        require_integer(f"{site}: rank", rank, 0, "an integer")
    if all(ranks.get(site, 1) == 0 for site in found):
        raise TargetError(f"ranks is 0 for every weight that {name} is on: pk.unwrap(model, {name!r}) takes it off")
    built = {
        site: _resized(found[site][0], rank) if rank else None
        for site, rank in ranks.items()
        if _rank(found[site][0], rank) != rank
    }
    changed = {site: (_rank(found[site][0], ranks[site]), ranks[site]) for site in built}
    for site, adapter in built.items():
        for at in found[site]:
            if adapter is None:
                take_off(at)
            else:
                at.put_(adapter)
    return changed


def _rank(at: InstalledAdapter, wanted: int) -> int:
    """The rank of an adapter; of a kind without one that of a whole matrix, where it is only to be taken off."""
    rank, shape = at.adapter.options.get("rank"), at.slot.geometry.shape
    if not isinstance(rank, int):
        if wanted == 0:
            return min(shape.rows, shape.columns)
        raise OptionError(f"{at.site or 'the model'}: {at.adapter.kind} was wrapped without a rank that could change")
    return rank


@torch.no_grad()
def _resized(at: InstalledAdapter, rank: int) -> Adapter:
    """An adapter of another rank with the ΔW of the one that is there, or near to it."""
    where, old = at.site or "the model", at.adapter
    at.require_values()
    if any(sharded(tensor) for tensor in (*old.state_dict().values(), at.host.parameter_of(at.slot))):
        raise UnsupportedLayerError(f"{where} is divided among processes (fully_shard): resize before")
    at.require_unmerged("resizing")
    if any(part.shares for _, part in old.parts()):
        raise OptionError(f"{where}: layers share the numbers of {old.kind}, so that none can have another rank alone")
    gamma = _gamma(old)
    options: dict[str, Any] = {**old.options, "rank": rank}
    if gamma is not None and registry.takes(type(old), "alpha"):
        options["alpha"] = gamma * (math.sqrt(rank) if options.get("rslora") else rank)
    base, dtype = at.base, next(old.parameters()).dtype
    try:
        new = registry.build(old.kind, at.slot.geometry.shape, base, **options).to(dtype)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None
    found = _gamma(new)
    if gamma is not None and not (found is not None and math.isclose(gamma, found, rel_tol=1e-9)):
        raise OptionError(f"{where}: the scale of {old.kind} depends on its rank, and cannot stay {gamma:g}")
    _carry(at, new)
    trainable = {key: parameter.requires_grad for key, parameter in old.named_parameters()}
    for key, parameter in new.named_parameters():
        parameter.requires_grad_(trainable.get(key, parameter.requires_grad))
    return new


def _gamma(adapter: Adapter) -> float | None:
    """γ of an adapter, or of the one inside it."""
    scales = [vars(part).get("scale") for _, part in adapter.parts()]
    return next((scale for scale in scales if isinstance(scale, float)), None)


def _carry(at: InstalledAdapter, new: Adapter) -> None:
    """Give the new adapter the numbers of the one that is there."""
    old = at.adapter
    before, after = old.options["rank"], new.options["rank"]
    own, given = new.state_dict(), old.state_dict()
    trained = bool(at.change().sqnorm())
    pair, gates = old.pair(), type(old).gates
    exact = pair is not None and pair.up0 is None
    if trained and not (exact or gates):
        raise OptionError(
            f"{at.site or 'the model'}: {old.kind} has been trained, and its numbers at rank {before} say nothing at "
            f"rank {after}: resize before training"
        )
    if trained and gates and after < before:
        up, down = given["up"] * given[gates], given["down"]
        kept = (up.norm(dim=0) * down.norm(dim=1)).topk(after).indices.sort().values
        given = {"up": given["up"][:, kept], gates: given[gates][kept], "down": down[kept]}
    elif trained and pair is not None and after < before:
        best, _ = truncate(LowRank(pair.up.detach(), pair.down.detach()), Keep(rank=after))
        given = {"up": best.B, "down": best.A}
    if own.keys() != given.keys():
        return  # of another structure at this rank, as lokr's block: it has a start of its own
    for key, tensor in own.items():
        part = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, given[key].shape, strict=True))
        tensor[part] = given[key][part]
