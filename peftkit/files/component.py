"""A native file of a whole pipeline on one of its parts, and a file of one part on the pipeline."""

from __future__ import annotations

from collections.abc import Iterable

from peftkit.files.formats.patch import AdapterFile
from peftkit.files.rename import relabelled
from peftkit.wrapping.pipeline import part_of


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
        return relabelled(bundle, {n: n if whole else prefix + n for n in names if not whole or n.startswith(prefix)})
    if any(name.startswith(prefix) for name in names):
        return relabelled(bundle, {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)})
    return bundle
