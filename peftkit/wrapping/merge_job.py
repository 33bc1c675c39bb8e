"""One weight of a merge: the changes to add to it, and the tensor that they are added to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.delta import Delta
from peftkit.kernels.sharding import Division, local, sharded
from peftkit.wrapping.divided import gathered, gathered_adapter
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.sites import Slot
from peftkit.wrapping.walk import dotted


class Target:
    """All of a parameter that a merge writes to: itself, or where it is divided among processes, a gathered copy.

    Attributes:
        whole: all of the parameter, in its own shape.
        part: what this process holds of the parameter.
        division: how the parameter is divided; None where it is not.
    """

    def __init__(self, parameter: Tensor) -> None:
        own = parameter.detach()
        self.whole, self.part = gathered(parameter), local(own)
        self.division = Division.of(own) if sharded(own) else None
        if self.division and self.whole.untyped_storage().data_ptr() == self.part.untyped_storage().data_ptr():
            self.whole = self.whole.clone()  # a process that is alone has it all

    @torch.no_grad()
    def put_(self) -> None:
        """Give this process its part of what was written to the copy."""
        if self.division is not None:
            self.part.copy_(self.division.part(self.whole))


@dataclass(frozen=True, eq=False)
class Job:
    """One weight and the changes to add to it.

    Attributes:
        site: the name of the weight.
        names: the adapters that are merged.
        deltas: λ·ΔW (m, n) of these adapters, whole.
        target: the weight's parameter.
    """

    host_name: str
    host: Adapted
    slot_name: str
    slot: Slot
    site: str
    names: tuple[str, ...]
    deltas: list[Delta]
    target: Target

    @property
    def weight(self) -> Tensor:
        """The weight, whole: a view of the target."""
        return self.slot.of(self.target.whole)

    @property
    def read_by_others(self) -> bool:
        """Whether adapters that are not merged read the weight as it was."""
        others = (self.host.adapter(name, self.slot_name) for name in self.host.adapters if name not in self.names)
        return any(other is not None and other.reads_base for other in others)


def jobs(host_name: str, host: Adapted, own: Sequence[str]) -> list[Job]:
    """The module's weights that adapters of these names are on."""
    found: list[Job] = []
    targets: dict[str, Target] = {}
    for slot_name, slot in host.adapter_state.slots.items():
        names = tuple(name for name in own if host.adapter(name, slot_name) is not None)
        if names:
            if slot.parameter not in targets:
                targets[slot.parameter] = Target(host.parameter_of(slot))
            site, target = dotted(host_name, slot_name) or "the model", targets[slot.parameter]
            deltas = _deltas(host, slot_name, names, target)
            found.append(Job(host_name, host, slot_name, slot, site, names, deltas, target))
    return found


def by_target(found: Iterable[Job]) -> Iterator[tuple[Target, list[Job]]]:
    """Yield each parameter with the jobs on it."""
    groups: dict[int, list[Job]] = {}
    for job in found:
        groups.setdefault(id(job.target), []).append(job)
    for group in groups.values():
        yield group[0].target, group


def _deltas(host: Adapted, slot_name: str, names: Sequence[str], target: Target) -> list[Delta]:
    """λ·ΔW of these adapters on one weight, of those with a strength, as in eval mode."""
    slot, strengths = host.adapter_state.slots[slot_name], host.adapter_state.strengths
    W = slot.geometry.matrix(slot.of(target.whole)) if target.division else host.base_of(slot_name).detach()
    held = {name: host.adapter(name, slot_name) for name in names if strengths[name] != 0}
    adapters = {name: gathered_adapter(adapter) for name, adapter in held.items() if adapter is not None}
    training = [adapter for adapter in adapters.values() if adapter.training]
    try:
        for adapter in training:
            adapter.eval()
        return [adapter(W, strengths[name]) for name, adapter in adapters.items()]
    finally:
        for adapter in training:
            adapter.train()
