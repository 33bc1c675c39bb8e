"""One adapter on all layers that share a weight, such as an embedding and the head that is tied to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from peftkit.errors import OptionError, UnsupportedLayerError
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.select import memory, tied_with
from peftkit.wrapping.sites import Site

Rule = TypeVar("Rule")


def shared_places(model: nn.Module, sites: Mapping[str, Site], targeted: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return, for each targeted site whose weight is shared, the names of all sites of that weight, in model order.

    Raises:
        UnsupportedLayerError: the weight is shared with what is no layer that can be adapted, or reads it otherwise.
    """
    whole: dict[object, list[Site]] = {}
    for site in sites.values():
        if site.slot.start is None:
            whole.setdefault(memory(site.parameter), []).append(site)
    found: dict[str, tuple[str, ...]] = {}
    for name, others in tied_with(model, [sites[name] for name in targeted]).items():
        same = whole.get(memory(sites[name].parameter), [])
        shapes = {(site.slot.geometry.shape, site.slot.geometry.transposed) for site in same}
        if len(same) != len(others.split(", ")) + 1 or len(shapes) > 1:
            raise UnsupportedLayerError(
                f"{name} shares its weight with {others}, and not all of these are layers that can be adapted and have "
                "a row for each of its rows: one adapter cannot be shared. Pass tied='untie' or tied='skip'"
            )
        found[name] = tuple(site.name for site in same)
    return found


def at_every_place(
    chosen: Mapping[str, tuple[Rule, str]], places: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, tuple[Rule, str]], dict[str, str]]:
    """Return a choice with all places of shared weights, and of each of these but the first, the first.

    Args:
        chosen: site -> the rule and the pattern that selected it.
        places: from `shared_places`.

    Raises:
        OptionError: two rules are for one weight.
    """
    found: dict[str, tuple[Rule, str]] = {}
    first: dict[str, str] = {}
    for site, choice in chosen.items():
        own, *others = places.get(site, (site,))
        for place in (own, *others):
            if found.setdefault(place, choice)[0] is not choice[0]:
                raise OptionError(
                    f"{' and '.join((own, *others))} are one weight, which two rules adapt: give it one of them"
                )
        first |= dict.fromkeys(others, own)
    return found, first


def weight_of(host: Adapted) -> int:
    """Return a number for the parameter that a module's adapters change: the same for modules that share one."""
    slots = [slot for slot in host.adapter_state.slots.values() if host.adapts(slot.parameter)]
    return id(host.parameter_of(slots[0])) if len(slots) == 1 else id(host)


def acting_alike(hosts: Mapping[str, tuple[Adapted, tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    """Yield the modules of each weight on which the very same adapters are, at the same strengths.

    Args:
        hosts: adapted modules by name, each with the names of the adapters that are asked about.
    """
    groups: dict[int, list[str]] = {}
    for at, (host, _) in hosts.items():
        groups.setdefault(weight_of(host), []).append(at)
    for own in groups.values():
        acting = [(hosts[at][0], name) for at in own for name in hosts[at][1]]
        distinct = {(id(host.adapter(name, "")), host.adapter_state.strengths[name]) for host, name in acting}
        if len(acting) == len(own) * len(distinct):
            yield tuple(own)
