"""Changes of norms and biases in the files of other programs, as adapters of their own: "full" on a vector."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, cast

from peftkit.files.families.layouts import Placement
from peftkit.files.formats.patch import AdapterFile, Patch
from peftkit.geometry import Shape


def with_vectors(bundle: AdapterFile) -> AdapterFile:
    """Return a file whose changes of norms and biases are patches too, as "<module>.weight" and "<module>.bias"."""
    if not bundle.vectors:
        return bundle
    own = {
        key: Patch("full", {}, Shape(v.numel(), 1), {"change": v.reshape(-1, 1)}, scale="1: a vector has no alpha")
        for key, v in bundle.vectors.items()
    }
    return replace(bundle, patches=cast("Mapping[str, Patch]", ChainMap(own, cast(Any, bundle.patches))))


def module_of(bundle: AdapterFile, name: str) -> str:
    """Return the module that a patch is of, as the file spells it."""
    return name.rpartition(".")[0] if name in bundle.vectors else name


def vector_parts(
    bundle: AdapterFile, name: str, parts: tuple[Placement, ...], known: Collection[str]
) -> tuple[Placement, ...]:
    """Return where a patch goes on a model: a change of a bias on the biases of its module's parts.

    Args:
        bundle: the file, from `with_vectors`.
        name: of the patch.
        parts: of its module.
        known: names of the model's weights.
    """
    if name not in bundle.vectors or not name.endswith(".bias"):
        return parts
    biases = tuple(replace(part, weight=f"{part.weight}.bias") for part in parts)
    return biases if all(part.weight in known for part in biases) else ()
