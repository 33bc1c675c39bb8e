"""One strength for every weight of a file, or one by patterns over their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from peftkit.wrapping.strength import require_strength

#: strength of a file: one number, or by patterns over its weights, of which the first that matches counts
Strength = float | Mapping[str, float]


class Strengths:
    """The strengths a user gave for the weights of one file, and which of the patterns have matched one.

    Example:
        >>> strengths = Strengths({"attn.*": 0.5, "mlp.*": 2})
        >>> strengths.of("attn.q"), strengths.of("norm")
        (0.5, None)
        >>> strengths.unmatched
        ['mlp.*']
    """

    def __init__(self, given: Strength) -> None:
        patterns = given if isinstance(given, Mapping) else {"*": given}
        for value in patterns.values():
            require_strength(value)
        self._patterns = {pattern: float(value) for pattern, value in patterns.items()}
        self._left = set(given) if isinstance(given, Mapping) else set[str]()

    def of(self, *names: str) -> float | None:
        """The strength of a weight with these names: of the first pattern that matches one, None without any."""
        for pattern, value in self._patterns.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                self._left.discard(pattern)
                return value
        return None

    @property
    def unmatched(self) -> list[str]:
        """The patterns that have matched nothing so far, sorted."""
        return sorted(self._left)
