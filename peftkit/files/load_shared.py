"""Patches of a file on the layers of a model that share a weight: one adapter for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from peftkit.errors import MismatchError
from peftkit.files.formats.patch import Patch
from peftkit.wrapping.sites import Site

#: sites, each with the patch for it
Fitting = Sequence[tuple[Site, Patch]]


def everywhere(
    fitting: Fitting, places: Mapping[str, tuple[str, ...]], sites: Mapping[str, Site], path: object
) -> list[tuple[Site, Patch]]:
    """Return the patches with one for every place of a shared weight, all but the first the same as the first.

    Args:
        fitting: the patches that the file has.
        places: site -> all sites of its weight.
        sites: all of the model.
        path: of the file, for errors.

    Raises:
        MismatchError: the file has two adapters for one weight, which differ.
    """
    found: dict[str, tuple[Site, Patch]] = {}
    for site, patch in fitting:
        own, *others = places.get(site.name, (site.name,))
        if own not in found:
            found[own] = sites[own] if others else site, replace(patch, same_as="")
            found |= {place: (sites[place], replace(patch, same_as=own)) for place in others}
        elif not _equal(found[own][1], patch):
            raise MismatchError(
                f"{path}: {own} and {site.name} are one weight in the model, and have two adapters in the file: "
                "pass tied='untie'"
            )
    return list(found.values())


def lone(fitting: Fitting, shared: Mapping[str, str]) -> dict[str, str]:
    """Return, of sites that share their weight, those whose adapter is not on all layers of it."""
    owners = {site.name: patch.same_as or site.name for site, patch in fitting}
    count = Counter(owners.values())
    return {name: others for name, others in shared.items() if count[owners[name]] < others.count(", ") + 2}


def _equal(ours: Patch, theirs: Patch) -> bool:
    """Whether two patches are of one adapter."""
    same = (ours.kind, ours.options, set(ours.tensors)) == (theirs.kind, theirs.options, set(theirs.tensors))
    return same and all(torch.equal(tensor, theirs.tensors[key]) for key, tensor in ours.tensors.items())
