"""Merge adapters into the weights they sit on, and give every bit back.

The merged weight is W + Σ λᵢ·ΔWᵢ(W), summed in at least fp32 and rounded once, written in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from peftkit.delta import Delta
from peftkit.delta.addition import MergedWeight, add_, refuse_inert, refuse_overflow
from peftkit.errors import (
    MergeError,
    MergeStateError,
    OptionError,
    TiedWeightsError,
    UnsupportedLayerError,
    require_choice,
)
from peftkit.geometry import Geometry
from peftkit.wrapping.backup import BACKUPS, Backup, Copy, Merged, checksum
from peftkit.wrapping.divided import divided, require_not_empty
from peftkit.wrapping.layer import Adapted, adapted_modules, installed_adapters, names_of
from peftkit.wrapping.listing import Row, listing
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.roll import require_none_lost, roll_of, warn_never_ran
from peftkit.wrapping.select import tied_with
from peftkit.wrapping.share import acting_alike, weight_of
from peftkit.wrapping.sites import sites
from peftkit.wrapping.walk import dotted
from peftkit.wrapping.wrap import unwrap


@dataclass(frozen=True)
class MergeReport:
    """Say what a merge did. str(report) is a line, `table()` has a row for each weight.

    Attributes:
        weights: for each weight its name, the adapters in it, ‖ΔW‖, how far it moved and the share that was lost.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> report = pk.merge(model)
        >>> report.changed, report.norm
        (('the model',), 4.0)
    """

    weights: tuple[MergedWeight, ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the weights that moved."""
        return tuple(w.site for w in self.weights if w.change > 0)

    @property
    def norm(self) -> float:
        """‖ΔW‖ over all weights."""
        return math.sqrt(sum(w.norm**2 for w in self.weights))

    @property
    def lost(self) -> float:
        """The share of ΔW lost to rounding, over all weights."""
        total = sum(w.norm**2 for w in self.weights)
        return math.sqrt(sum((w.lost * w.norm) ** 2 for w in self.weights) / total) if total else 0.0

    def __str__(self) -> str:
        return (
            f"merged into {len(self.weights)} weights, {len(self.changed)} changed; "
            f"‖ΔW‖ = {self.norm:.4g}, {100 * self.lost:.2g} % of it lost to the dtype"
        )

    def table(self, *, every: bool = True) -> Table:
        """Every weight, for rich to print; every=False: one row for weights with the same adapters."""
        measures = {"‖ΔW‖": "{:.4g}".format, "lost to the dtype": "{:.2g} %".format}
        rows = [Row(w.site, (", ".join(w.adapters),), (w.norm, 100 * w.lost)) for w in self.weights]
        return listing(["adapters"], measures, rows, every=every)


@of_models
def merge(model: nn.Module, names: str | Sequence[str] | None = None, *, backup: str | None = "copy") -> MergeReport:
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

    Returns:
        What was merged, and what share of it the weights' dtype could not hold.

    Raises:
        OptionError: backup is none of these, or names is empty.
        UnknownAdapterError: there is no adapter of one of the names.
        MergeStateError: adapters are merged already, or one is disabled.
        UnsupportedLayerError: the model is divided among processes.
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
    _refuse_divided(model, "merge")
    affected = _affected(model, names)
    if backup is None:
        return _bake(model, affected)
    done: list[Adapted] = []
    weights: list[MergedWeight] = []
    try:
        for host_name, (host, own) in affected.items():
            weights += _merge_host(host_name, host, own, backup, done)
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
    _refuse_divided(model, "restore")
    merged = {name: host for name, host in adapted_modules(model).items() if host.adapter_state.merged is not None}
    if not merged:
        raise MergeStateError("nothing is merged into this model: restore follows merge")
    for name, host in merged.items():
        state = host.adapter_state
        assert state.merged is not None
        for slot_name, was in state.merged.checksums.items():
            if checksum(host.weight_of(state.slots[slot_name])) != was:
                raise MergeStateError(
                    f"the weight of {name or 'the model'} has changed since the merge (trained, cast or overwritten): "
                    "restoring would not give the base back. unwrap(model, keep_merged=True) keeps it as it is"
                )
    _restore(list(merged.values()))
    return tuple(merged)


def _refuse_divided(model: nn.Module, verb: str) -> None:
    """Raise for a model whose weights are divided among processes."""
    if divided(model):
        raise UnsupportedLayerError(
            f"{verb}: the model's weights are divided among processes (fully_shard), weights that are whole were "
            "expected: pk.save the adapters from every process, and merge the file into the base's checkpoint with "
            "pk.merge_checkpoint, or pk.load it onto a whole model and merge there; restore before fully_shard"
        )


#: module name -> the adapted module and those of its adapters that are merged
_Affected = Mapping[str, "tuple[Adapted, tuple[str, ...]]"]


def _affected(model: nn.Module, names: str | Sequence[str] | None) -> _Affected:
    """The modules with adapters of these names, or of any; raises unless they can be merged now."""
    wanted = [names] if isinstance(names, str) else list(names_of(model) if names is None else names)
    if not wanted:
        raise OptionError("names is empty: name an adapter, or leave it out to merge them all")
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
    shared = tied_with(model, [site for site in sites(model).values() if site.module_name in affected])
    for own in acting_alike(affected):  # one adapter on all layers of the weight, which gets its ΔW once
        shared = {s: others for s, others in shared.items() if s not in own or others.count(", ") + 2 > len(own)}
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

    slot_name: str
    site: str
    names: tuple[str, ...]
    deltas: list[Delta]
    weight: Tensor
    geometry: Geometry


def _jobs(host_name: str, host: Adapted, own: Sequence[str]) -> Iterator[_Job]:
    """The module's weights that adapters of these names are on."""
    for slot_name, slot in host.adapter_state.slots.items():
        names, deltas = _deltas(host, slot_name, own)
        if names:
            site = dotted(host_name, slot_name) or "the model"
            yield _Job(slot_name, site, names, deltas, host.weight_of(slot).detach(), slot.geometry)


@torch.no_grad()
def _merge_host(
    host_name: str, host: Adapted, own: tuple[str, ...], mode: str, done: list[Adapted]
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
    for slot_name, site, names, deltas, weight, geometry in jobs:
        before = weight.clone()
        backups[slot_name] = Copy(before)  # until the merge of this weight is complete
        norm, change, lost = add_(deltas, weight, geometry)
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
def _bake(model: nn.Module, affected: _Affected) -> MergeReport:
    """Merge for good. Nothing can be restored, so every check comes before the first weight is written."""
    once: dict[int, str] = {}
    for host_name, (host, _) in affected.items():
        once.setdefault(weight_of(host), host_name)
    jobs = [job for at in once.values() for job in _jobs(at, *affected[at])]
    expected = []
    for _, site, names, deltas, weight, geometry in jobs:
        refuse_overflow(site, names, deltas, weight)
        expected.append(MergedWeight(site, names, *add_(deltas, weight, geometry, dry=True)))
    refuse_inert(expected)
    weights = [
        MergedWeight(site, names, *add_(deltas, weight, geometry, safe=True))
        for _, site, names, deltas, weight, geometry in jobs
    ]
    for name in dict.fromkeys(name for _, own in affected.values() for name in own):
        unwrap(model, name)
    return MergeReport(tuple(weights))


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
            weight = host.weight_of(state.slots[slot_name])
            weight.copy_(snapshot.original(weight))
    for host in hosts:
        host.adapter_state.merged = None
        host.adapter_state.refresh()
