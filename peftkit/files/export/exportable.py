"""Layers that programs adapt, and the refusal of adapters of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftkit.errors import ExportError
from peftkit.files.entries import AdapterEntry
from peftkit.files.export.programs import Target


def require_exportable(items: Sequence[AdapterEntry], vectors: Sequence[AdapterEntry], goal: Target) -> None:
    """Refuse adapters of layers that the program does not adapt."""
    if vectors and (not items or not (goal.beside or goal.norms)):
        without = "" if items else " without adapters of matrices"
        raise ExportError(
            f"{vectors[0].name}: it is a norm's weight or a bias, and no file for {goal.title} is written with one"
            f"{without}; keep it in this library's own format, or merge it"
        )
    for item in items:
        reason = next((reason for refused, reason in _refusals(item, goal) if refused), None)
        if reason is not None:
            raise ExportError(f"{item.name}: {reason}")


def _refusals(item: AdapterEntry, goal: Target) -> Iterator[tuple[bool, str]]:
    """Yield whether an adapter is refused for its layer, and the reason. Only PEFT's folders hold most of them."""
    stack = item.shape.experts > 1
    yield (
        item.embedding and "embeddings" not in goal.special,
        f"it is an embedding, and {goal.title} reads no adapter of one; export it for peft, merge it, or keep it in "
        "this library's own format",
    )
    yield (
        item.flipped and "conv1d" not in goal.special,
        f"its layer keeps the weight as (in, out), as GPT-2's Conv1D does, and {goal.title} adapts no such layers; "
        "export it for peft, or merge it",
    )
    yield (
        stack and "experts" not in goal.special,
        f"it is a stack of {item.shape.experts} experts in one parameter, and {goal.title} adapts no such weights; "
        "export it for peft, or merge it",
    )
    yield (
        stack and item.transposed and bool(item.file),
        "its matrices are kept as (in, out), which PEFT asks the module of the model about: load "
        f"{item.file} onto the model and export that",
    )
    yield (
        item.transposed and not stack and not item.flipped,
        "no other program reads an adapter of a transposed convolution, whose weight is kept as (in, out); keep it in "
        "this library's own format",
    )
