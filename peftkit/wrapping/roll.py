"""Remember which layers of a model were adapted, to tell those that lost their adapter and those that never ran."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from peftkit.errors import LostAdapterError, NeverRanWarning
from peftkit.kernels.torch_private import compiled, own_parameters
from peftkit.wrapping.lookup import require_size
from peftkit.wrapping.walk import named_modules, unwrapped

if TYPE_CHECKING:
    from peftkit.wrapping.layer import Adapted

_ROLLS: weakref.WeakKeyDictionary[nn.Module, Roll] = weakref.WeakKeyDictionary()


class Roll:
    """The adapted modules of one model by name, and whether its first backward has come yet.

    References are weak: a layer that other code replaces is gone, and its adapter with it. A copied or pickled model
    starts a roll of its own at its next wrap. What runs compiled is not seen to run, and not missed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.hosts: dict[str, weakref.ref[Adapted]] = {}
        #: the names of all modules at the last wrap
        self.names: frozenset[str] = frozenset()
        self.pending = True

    def absent(self) -> list[str]:
        """Return the names of modules whose acting adapters have not run since they were put there, if others have."""
        model = self.model()
        hosts = {name: host for name, ref in self.hosts.items() if (host := ref()) is not None and is_adapted(host)}
        if model is None or not any(host.adapter_state.ran for host in hosts.values()):
            return []
        unseen = compiled(model)
        elsewhere = {id(own) for host in hosts.values() if host.adapter_state.ran for own in host.adapters.children()}
        unseen |= {id(host) for host in hosts.values() if elsewhere.issuperset(map(id, host.adapters.children()))}
        waiting = {name: host.adapter_state for name, host in hosts.items() if id(host) not in unseen}
        return [name or "the model" for name, state in waiting.items() if state.now().strengths and not state.ran]

    def watch(self, output: Tensor | None) -> Roll | None:
        """Call the roll when the first gradient arrives at an output: by then the whole forward has run.

        Returns the roll while it is to be called, None after.
        """
        if output is not None and output.requires_grad:
            output.register_hook(self._first_backward)
        return self if self.pending else None

    def _first_backward(self, gradient: Tensor) -> None:
        del gradient
        if self.pending:
            self.pending = False
            warn_never_ran(self.absent(), "got no gradient in the model's first training step")


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module carries adapters now."""
    return "adapter_state" in module.__dict__


def roll_of(model: nn.Module) -> Roll | None:
    """Return the roll of a model that was wrapped; None of any other, and of a copy."""
    return _ROLLS.get(unwrapped(model))


def enrol(model: nn.Module, hosts: Mapping[str, Adapted]) -> None:
    """Put the adapted modules of a model on its roll."""
    roll = _ROLLS.setdefault(model, Roll(model))
    roll.pending = True
    roll.names = frozenset(name for name, _ in named_modules(model))
    for name, host in hosts.items():
        roll.hosts[name] = weakref.ref(host)
        host.adapter_state.roll = roll


def require_none_lost(model: nn.Module) -> None:
    """Raise LostAdapterError if a module that was adapted is no longer part of the model, or was copied into another.

    A copy is what `fuse_qkv_projections` makes: one layer with the weights of several, which runs in their place.
    """
    roll = roll_of(model)
    if roll is None:
        return
    modules = dict(named_modules(model))
    present = {name for name, module in modules.items() if is_adapted(module)}
    enrolled = {name: ref for name, ref in roll.hosts.items() if name not in present}
    # one that was unwrapped as part of something smaller is still there, and carries nothing
    for name, module in named_modules(model):
        for slot in cast("Adapted", module).adapter_state.slots.values() if is_adapted(module) else ():
            if slot.start is None and slot.base is None and not slot.geometry.transposed:
                require_size(cast(Tensor, own_parameters(module)[slot.parameter]), slot.geometry, name or "the model")
    lost = [name for name, ref in enrolled.items() if (host := ref()) is None or is_adapted(host)]
    if lost:
        raise LostAdapterError(
            f"{lost[0] or 'the model'} was adapted and is now another layer without an adapter"
            f"{f', and {len(lost) - 1} more' if len(lost) > 1 else ''}: it was replaced since "
            "(resize_token_embeddings, quantisation, …), and what its adapter learned is not in "
            "this model any more. Put the layer back, or wrap the new one under the same name= to go on without it"
        )
    for name in sorted(modules.keys() - roll.names):
        parent = name.rpartition(".")[0]
        beside = [other for other in present if other.rpartition(".")[0] == parent and other != name]
        copied = [other for other in beside if _holds(modules[name], cast("Adapted", modules[other]))]
        if copied:
            raise LostAdapterError(
                f"{name} has come into the model since it was wrapped, with the base weight of {min(copied)} copied "
                "into it: it runs without the adapter (fuse_qkv_projections does so). Undo it "
                f"(unfuse_qkv_projections(), and del the layer {name} if it is still there), then merge before fusing"
            )


def _holds(module: nn.Module, host: Adapted) -> bool:
    """Whether rows of a module's weight are the base weight under an adapter."""
    weight = own_parameters(module).get("weight")
    if weight is None or weight.dim() < 2:
        return False
    for slot_name in host.adapter_state.slots:
        base = host.base_of(slot_name)
        if weight[0].numel() != base.shape[1] or weight.is_meta or len(weight) < len(base):
            continue
        rows = weight.detach().flatten(1)
        starts = (rows == base[0].to(rows)).all(1).nonzero().flatten().tolist()
        if any(torch.equal(rows[start : start + len(base)], base.to(rows)) for start in starts):
            return True
    return False


def warn_never_ran(names: Sequence[str], what: str) -> None:
    """Warn of adapters whose weight is never used through them."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"the adapters of {', '.join(names[:3])}{more} {what}, while others ran: the model reads their weight "
            "without calling the layer, or does not use it. Adapt a weight that is read with "
            "Rule(targets, kind, read=True), or leave it out with exclude=",
            NeverRanWarning,
            stacklevel=3,
        )
