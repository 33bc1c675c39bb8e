"""Merge adapters into the weights they sit on, and give every bit back.

The merged weight is W + Σ λᵢ·ΔWᵢ(W), summed in at least fp32 and rounded once, written in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftkit.delta import Delta
from peftkit.delta.addition import MergedWeight, add_, refuse_inert, refuse_overflow
from peftkit.errors import (
    MergeError,
    MergeStateError,
    TiedWeightsError,
    require_choice,
    require_option,
)
from peftkit.wrapping.backup import BACKUPS, Backup, Copy, Merged, checksum
from peftkit.wrapping.divided import require_not_empty, require_whole
from peftkit.wrapping.installed import adapted_modules, installed_adapters, names_of
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.merge_report import MergeReport as MergeReport
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.quantised_merge import Quantised, Replaced
from peftkit.wrapping.roll import require_none_lost, roll_of, warn_never_ran
from peftkit.wrapping.select import tied_with
from peftkit.wrapping.share import acting_alike, weight_of
from peftkit.wrapping.sites import Slot
from peftkit.wrapping.vectors import every_site
from peftkit.wrapping.walk import dotted
from peftkit.wrapping.wrap import unwrap


@of_models
def merge(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    backup: str | None = "copy",
    into: str | None = None,
    origin: nn.Module | Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Write W + Σ λᵢ·ΔWᵢ into the weights, in place: of all adapters, or of those named.

    The sum is formed in at least float32 and rounded once. Merged adapters act through the weight; the others go on
    acting on top of it, on the base they were made for. If anything raises, the weights are what they were.

    Args:
        model: a wrapped model.
        names: one adapter or several; by default all.
        backup: how to keep what `restore` needs. "copy" holds every merged weight in main memory. "packed" holds the
            compressed difference of the bits and is slower: where ‖ΔW‖ is 3 % of ‖W‖, 0.42 of a copy in bf16, 0.61
            in fp16, 0.71 in fp32. None keeps nothing and takes the adapters off the model: for good, in the memory of
            a few blocks of rows.
        into: what becomes of quantised weights, which by default are refused: their grid is far coarser than most ΔW.
            "dequantised" puts ordinary layers in their place, with the memory of these. "requantised" quantises
            W + ΔW again, and raises if less than half of a ΔW would survive: at 4 bits almost all of it rounds away,
            unless W is the original weight. Other weights are merged as ever.
        origin: the weights that were quantised, for into="requantised": the original model, or its state dict.
        dtype: of the weights with into="dequantised"; by default what the quantised layer was made of, or the
            rest of the model where the layer keeps no record of it.

    Returns:
        What was merged, and what share of it the weights' dtype could not hold; with into="requantised", what share of
        ΔW survived.

    Raises:
        OptionError: backup is none of these, or names is empty.
        UnknownAdapterError: there is no adapter of one of the names.
        MergeStateError: adapters are merged already, or one is disabled.
        UnsupportedLayerError: the model is divided among processes.
        QuantisedMergeError: a weight is quantised and into is None, or less than half of a ΔW would survive.
        WrongBaseError: a weight of origin is not what a quantised one was made of.
        MergeError: a ΔW is not finite, overflows or is lost whole to the dtype, or elements of a weight share memory.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> print(pk.merge(model))
        merged into 1 weights, 1 changed; ‖ΔW‖ = 4, ... % of it lost to the dtype
        >>> pk.restore(model)
        ('',)
    """
    require_choice("backup", backup, (*BACKUPS, None))
    require_whole(model, "merge")
    quantised = Quantised(model, into, origin, dtype)
    affected = _affected(model, names)
    quantised.require(affected)
    if backup is None:
        return _bake(model, affected, quantised)
    done: list[Adapted] = []
    weights: list[MergedWeight] = []
    try:
        for host_name, (host, own) in affected.items():
            weights += _merge_host(host_name, host, own, backup, done, quantised)
        quantised.refuse_lost(weights)
        refuse_inert(weights)
    except BaseException:
        _restore(done)
        raise
    return MergeReport(tuple(weights))


@of_models
def restore(model: nn.Module) -> tuple[str, ...]:
    """Give merged weights back, bit for bit, and let their adapters act again.

    Args:
        model: a model with merged adapters.

    Returns:
        The names of the modules whose weights were restored.

    Raises:
        UnsupportedLayerError: the model is divided among processes.
        MergeStateError: nothing is merged, or a weight was changed after the merge; all weights are then as they were.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> before = model[0].weight.clone()
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> _ = pk.merge(model)
        >>> pk.restore(model)
        ('0',)
        >>> torch.equal(model[0].weight, before)
        True
    """
    require_whole(model, "restore")
    merged = {name: host for name, host in adapted_modules(model).items() if host.adapter_state.merged is not None}
    if not merged:
        raise MergeStateError("nothing is merged into this model: restore follows merge")
    for name, host in merged.items():
        state = host.adapter_state
        assert state.merged is not None
        for slot_name, was in state.merged.checksums.items():
            if was != _mark(host, slot_name, state.merged.backups[slot_name]):
                raise MergeStateError(
                    f"the weight of {name or 'the model'} has changed since the merge (trained, cast or overwritten): "
                    "restoring would not give the base back. unwrap(model, keep_merged=True) keeps it as it is"
                )
    _restore(list(merged.values()))
    return tuple(merged)


#: module name -> the adapted module and those of its adapters that are merged
_Affected = Mapping[str, "tuple[Adapted, tuple[str, ...]]"]


def _affected(model: nn.Module, names: str | Sequence[str] | None) -> _Affected:
    """The modules with adapters of these names, or of any; raises unless they can be merged now."""
    wanted = [names] if isinstance(names, str) else list(names_of(model) if names is None else names)
    require_option(bool(wanted), "names", names, "a name or several", " Leave it out to merge all adapters")
    for name in wanted:
        names_of(model, name)
    own = {at: (host, tuple(n for n in host.adapters if n in wanted)) for at, host in adapted_modules(model).items()}
    affected = {at: (host, names) for at, (host, names) in own.items() if names}
    require_not_empty(model)
    require_none_lost(model)
    for at in installed_adapters(model, wanted):
        at.require_values(written=True)
    for host_name, (host, merging) in affected.items():
        _check_state(host_name or "the model", host, merging)
    _refuse_shared(model, affected)
    roll = roll_of(model)
    absent = set() if roll is None else set(roll.absent())
    warn_never_ran([at for at in affected if (at or "the model") in absent], "are merged, and never ran")
    return affected


def _refuse_shared(model: nn.Module, affected: _Affected) -> None:
    """Raise for a weight that came to be shared after it was adapted: a merge would change its other module too."""
    own = [site for site in every_site(model).values() if site.module_name in affected]
    shared = tied_with(model, [s for s in own if affected[s.module_name][0].adapts(s.slot.parameter)])
    for places in acting_alike(affected):  # one adapter on all layers of the weight, which gets its ΔW once
        shared = {s: o for s, o in shared.items() if s not in places or o.count(", ") + 2 > len(places)}
    if shared:
        site, other = next(iter(shared.items()))
        raise TiedWeightsError(
            f"{site} shares its weight with {other} since it was adapted (tie_weights ties them again): a merge would "
            "change both. Give the layer a weight of its own, or merge before the weights are tied"
        )


def _check_state(where: str, host: Adapted, own: tuple[str, ...]) -> None:
    """Raise unless these adapters can be merged into the module's weights now."""
    state = host.adapter_state
    if state.merged is not None:
        raise MergeStateError(f"{', '.join(state.merged.names)} is merged into {where} already: restore(model) first")
    hidden = [name for name in own if state.hides(name)]
    if hidden:
        raise MergeStateError(f"{hidden[0]} is disabled on {where}: merge outside the `disabled` or `enabled` block")
    for slot in state.slots.values():
        weight = host.weight_of(slot)
        if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
            raise MergeError(
                f"{where}: several elements of its weight share memory (it was expanded), so none can change"
            )


class _Job(NamedTuple):
    """One weight and the changes to add to it."""

    host_name: str
    host: Adapted
    slot_name: str
    slot: Slot
    site: str
    names: tuple[str, ...]
    deltas: list[Delta]
    weight: Tensor


def _jobs(host_name: str, host: Adapted, own: Sequence[str]) -> Iterator[_Job]:
    """The module's weights that adapters of these names are on."""
    for slot_name, slot in host.adapter_state.slots.items():
        names, deltas = _deltas(host, slot_name, own)
        if names:
            site = dotted(host_name, slot_name) or "the model"
            yield _Job(host_name, host, slot_name, slot, site, names, deltas, host.weight_of(slot).detach())


@torch.no_grad()
def _merge_host(
    host_name: str, host: Adapted, own: tuple[str, ...], mode: str, done: list[Adapted], quantised: Quantised
) -> list[MergedWeight]:
    """Merge into the weights of one module, which goes to `done` before the first is written."""
    first = next((other.adapter_state.merged for other in done if weight_of(other) == weight_of(host)), None)
    if first is not None:  # the weight has their ΔW
        host.adapter_state.merged = Merged(own, first.backups, first.checksums)
        done.append(host)
        host.adapter_state.refresh()
        return []
    jobs = list(_jobs(host_name, host, own))
    backups: dict[str, Backup] = {}
    merged = host.adapter_state.merged = Merged(own, backups, {})
    done.append(host)
    results = []
    for _, _, slot_name, slot, site, names, deltas, weight in jobs:
        if slot.base is not None:
            made = quantised.replacement(host_name, host, names, deltas)
            backups[slot_name] = made.put(host)
            merged.checksums[slot_name] = _mark(host, slot_name, backups[slot_name])
            results.append(made.result)
            continue
        before = weight.clone()
        backups[slot_name] = Copy(before)  # until the merge of this weight is complete
        norm, change, lost = add_(deltas, weight, slot.geometry)
        if not math.isfinite(norm):
            raise MergeError(f"{site}: the ΔW of {', '.join(names)} is not finite; nothing was merged")
        if not math.isfinite(change):
            raise MergeError(f"{site}: W + ΔW overflows {weight.dtype}, or was not finite before; nothing was merged")
        backups[slot_name] = BACKUPS[mode].of(before, weight)
        merged.checksums[slot_name] = checksum(weight)
        results.append(MergedWeight(site, names, norm, change, lost))
    host.adapter_state.refresh()
    return results


@torch.no_grad()
def _bake(model: nn.Module, affected: _Affected, quantised: Quantised) -> MergeReport:
    """Merge for good. Nothing can be restored, so every check comes before the first weight is written."""
    once: dict[int, str] = {}
    for host_name, (host, _) in affected.items():
        once.setdefault(weight_of(host), host_name)
    jobs = [job for at in once.values() for job in _jobs(at, *affected[at])]
    expected = [_expected(job, quantised) for job in jobs]
    quantised.refuse_lost(expected)
    refuse_inert(expected)
    weights = [_written(job, quantised) for job in jobs]
    for name in dict.fromkeys(name for _, own in affected.values() for name in own):
        unwrap(model, name)
    return MergeReport(tuple(weights))


def _expected(job: _Job, quantised: Quantised) -> MergedWeight:
    """What a merge for good would do to one weight."""
    if job.slot.base is not None:
        return quantised.replacement(job.host_name, job.host, job.names, job.deltas).result
    refuse_overflow(job.site, job.names, job.deltas, job.weight)
    return MergedWeight(job.site, job.names, *add_(job.deltas, job.weight, job.slot.geometry, dry=True))


def _written(job: _Job, quantised: Quantised) -> MergedWeight:
    """What a merge for good does to one weight."""
    if job.slot.base is None:
        return MergedWeight(job.site, job.names, *add_(job.deltas, job.weight, job.slot.geometry, safe=True))
    made = quantised.replacement(job.host_name, job.host, job.names, job.deltas)
    made.put(job.host)
    return made.result


def _mark(host: Adapted, slot_name: str, backup: Backup) -> int:
    """What is the same at `restore` as after the merge, unless the weight was changed in between."""
    slot = host.adapter_state.slots[slot_name]
    if slot.base is not None:  # evaluation may write the same numbers in another layout: the parameter is what counts
        return int(isinstance(backup, Replaced) and backup.is_in(host))
    return checksum(host.weight_of(slot))


def _deltas(host: Adapted, slot_name: str, own: Sequence[str]) -> tuple[tuple[str, ...], list[Delta]]:
    """The adapters among `own` on one weight, and λ·ΔW of those with a strength, as in eval mode."""
    present = {name: a for name in own if (a := host.adapter(name, slot_name)) is not None}
    W, strengths = host.base_of(slot_name).detach(), host.adapter_state.strengths
    training = [a for a in present.values() if a.training]
    try:
        for adapter in training:
            adapter.eval()
        return tuple(present), [a(W, strengths[name]) for name, a in present.items() if strengths[name] != 0]
    finally:
        for adapter in training:
            adapter.train()


@torch.no_grad()
def _restore(hosts: Sequence[Adapted]) -> None:
    once = {weight_of(host): host for host in hosts}  # a weight that is shared has one backup
    for host in once.values():
        state = host.adapter_state
        assert state.merged is not None
        for slot_name, snapshot in state.merged.backups.items():
            if isinstance(snapshot, Replaced):
                snapshot.give_back(host)
                continue
            weight = host.weight_of(state.slots[slot_name])
            weight.copy_(snapshot.original(weight))
    for host in hosts:
        host.adapter_state.merged = None
        host.adapter_state.refresh()
