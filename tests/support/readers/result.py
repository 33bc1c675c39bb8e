"""What every reader returns, and how it says no."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


class Refused(Exception):  # noqa: N818 (a verdict, not an error of the reader)
    """The loader rejects the whole file, or the generation fails. The message says why."""


@dataclass(frozen=True)
class Read:
    """deltas and biases: canonical module -> merged − base, float64, only what changed. ignored: unused keys."""

    deltas: dict[str, Tensor]
    biases: dict[str, Tensor]
    ignored: list[str]


def result(
    deltas: Mapping[str, Tensor], biases: Mapping[str, Tensor], keys: Iterable[str], used: Iterable[str]
) -> Read:
    """A Read of what changed. NaN counts as a change: it marks values the loader leaves random."""
    return Read(
        {name: delta for name, delta in deltas.items() if bool((delta != 0).any())},
        {name: delta for name, delta in biases.items() if bool((delta != 0).any())},
        sorted(set(keys) - set(used)),
    )
