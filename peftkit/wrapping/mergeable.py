"""The adapted modules that a merge is to change, after making sure that it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from peftkit.errors import MergeError, MergeStateError, TiedWeightsError, UnsupportedLayerError, require_option
from peftkit.kernels.sharding import sharded
from peftkit.wrapping.divided import require_not_empty, require_pieces
from peftkit.wrapping.installed import adapted_modules, installed_adapters, names_of
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.roll import require_none_lost, roll_of, warn_never_ran
from peftkit.wrapping.select import tied_with
from peftkit.wrapping.share import acting_alike
from peftkit.wrapping.vectors import every_site

#: module name -> the adapted module and those of its adapters that are merged
Affected = Mapping[str, "tuple[Adapted, tuple[str, ...]]"]


def mergeable(model: nn.Module, names: str | Sequence[str] | None) -> Affected:
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


def _refuse_shared(model: nn.Module, affected: Affected) -> None:
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
        weight = host.parameter_of(slot)
        require_pieces(where, weight)
        if sharded(weight) and slot.base is not None:
            raise UnsupportedLayerError(
                f"{where}: its weight is quantised and divided among processes, and the stored numbers of a quantised "
                "weight are merged whole: leave them whole (fully_shard(…, ignored_params=…))"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
            raise MergeError(
                f"{where}: several elements of its weight share memory (it was expanded), so none can change"
            )
