"""A native file of a whole pipeline on one of its parts, and a file of one part on the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from peftkit.files.formats.patch import AdapterFile
from peftkit.wrapping.pipeline import part_of

T = TypeVar("T")


def of_component(bundle: AdapterFile, component: str | None, ours: Iterable[str]) -> AdapterFile:
    """Return a native file under the names of a model, where one of the two is of a whole pipeline.

    Args:
        bundle: any file; those of other programs are left as they are, and resolved name by name.
        component: the part that is meant, None for no change.
        ours: the names of the model's weights.
    """
    if bundle.format != "native" or component is None:
        return bundle
    prefix = f"{component}."
    known, names = set(ours), {*bundle.patches, *bundle.extras}
    if any(name.startswith(prefix) for name in known):  # the model is the whole pipeline
        whole = any(part_of(name) for name in names)
        return _renamed(bundle, {n: n if whole else prefix + n for n in names if not whole or n.startswith(prefix)})
    if any(name.startswith(prefix) for name in names):
        return _renamed(bundle, {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)})
    return bundle


def _renamed(bundle: AdapterFile, names: Mapping[str, str]) -> AdapterFile:
    """The part of a file that has a new name, under it."""

    def chosen(entries: Mapping[str, T]) -> dict[str, T]:
        return {names[name]: entries[name] for name in entries if name in names}

    return replace(bundle, patches=chosen(bundle.patches), base=chosen(bundle.base), extras=chosen(bundle.extras))
