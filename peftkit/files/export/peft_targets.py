"""Which modules PEFT is to adapt: a list of the ends of their paths, where that selects them and no others."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence


def selection(adapted: Sequence[str], modules: Collection[str] | None) -> list[str] | None:
    """Return names for `target_modules`, which select every module whose path is one of them or ends in one.

    Args:
        adapted: the paths of the modules.
        modules: the paths of all modules of the model; None where they are not known, and only whole paths are safe.

    Returns:
        The shortest ends of paths that select no other module; None where even a whole path would, as "0" does of
        "1.0".
    """
    if modules is None:
        return list(adapted) if all("." in path for path in adapted) else None
    everywhere = Counter(itertools.chain.from_iterable(map(_ends, {*modules, *adapted})))
    own = Counter(itertools.chain.from_iterable(map(_ends, adapted)))
    found = [next((end for end in _ends(path) if own[end] == everywhere[end]), None) for path in adapted]
    return None if None in found else list(dict.fromkeys(end for end in found if end is not None))


def _ends(path: str) -> Iterator[str]:
    """The ends of a path, the shortest first and the path itself last."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
