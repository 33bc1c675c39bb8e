"""The levels at which language models have their layers, which differ by release of transformers and by class.

A model that also sees has its layers at `model.language_model.layers`, and had them at `model.layers` or
`language_model.model.layers` before; a base class without its head has them at `layers`. A file from one of these trees
is at home in another where the whole of it fits there, in one way.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from itertools import product

from peftkit.errors import AmbiguousFileError
from peftkit.files.formats.patch import AdapterFile
from peftkit.files.formats.peft import PREFIX
from peftkit.files.rename import names_of, relabelled, suggested

#: what follows the level of the language model
_LAYERS = ("layers", "embed_tokens", "norm")
#: the parts of a model that sees, beside its language model
_SIGHT = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector", "aligner")
#: what stands before these two and before the head in each tree
_TREES = (
    ("model.language_model.", "model.", ""),  # transformers from 4.52 on, and its checkpoints since
    ("model.", "", ""),  # a language model alone; Qwen2-VL before
    ("language_model.model.", "", "language_model."),  # LLaVA and Gemma 3 before
    ("language_model.", "", ""),  # a base class that sees
    ("", "", ""),  # a base class
    ("model.model.", "model.", "model."),  # a wrapper
)


def at_home(bundle: AdapterFile, paths: Iterable[str], file: object) -> AdapterFile:
    """Return a file under the names of a model that has its layers at other levels, or as it is.

    Args:
        bundle: the file.
        paths: of the model's modules and parameters, or of a checkpoint's tensors.
        file: its path, for the error.

    Raises:
        AmbiguousFileError: the file fits in several ways.
    """
    names, known = names_of(bundle), {way for path in paths for way in (path, path.rpartition(".")[0])}
    if all(_has(known, name.removeprefix(PREFIX)) for name in names):
        return bundle
    ways: list[dict[str, str]] = []
    for ours, theirs in product(_TREES, repeat=2):
        way: dict[str, str] = {}
        for name in names:
            way[name] = _moved(name, ours, theirs)
            if not way[name] or not _has(known, way[name]):
                break
        else:
            ways += [] if way in ways else [way]
    if not ways:
        return bundle
    if len(ways) > 1:
        first = next(name for name in names if len({way[name] for way in ways}) > 1)
        meant = sorted({way[first] for way in ways})
        rules = " or ".join(f"pass {suggested(bundle.name_in_file(first), name)}" for name in meant)
        raise AmbiguousFileError(f"{file}: {first} can be {' or '.join(map(repr, meant))}: {rules}")
    back = {new: old for old, new in bundle.renamed.items()}
    moved = {back.get(old, old): new for old, new in ways[0].items()}
    return replace(relabelled(bundle, ways[0]), renamed={old: new for old, new in moved.items() if old != new})


def _has(known: Container[str], name: str) -> bool:
    """Whether a model has a module of this name, or a parameter."""
    return name in known or name.rpartition(".")[0] in known


def _moved(name: str, ours: Sequence[str], theirs: Sequence[str]) -> str:
    """A name of one tree as another has it, "" for a name that the one does not have."""
    path = name.removeprefix(PREFIX)
    for before, after, children in zip(ours, theirs, (_LAYERS, _SIGHT, ("lm_head",)), strict=True):
        rest = path.removeprefix(before)
        if path.startswith(before) and rest.partition(".")[0] in children:
            return after + rest
    return ""
