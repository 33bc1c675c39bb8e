"""What a user says by patterns over names: which weights or keys, and how strong each of them is."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from peftkit.wrapping.strength import require_strength

#: strength of a file: one number, or by patterns over its weights, of which the first that matches counts
Strength = float | Mapping[str, float]


class Selection:
    """Names that match one of some patterns, and which of the patterns have matched one.

    Example:
        >>> from peftkit.files.patterns import Selection
        >>> selection = Selection(["attn.*", "mlp.*"])
        >>> selection.has("attn.q"), selection.has("norm")
        (True, False)
        >>> selection.unmatched
        ['mlp.*']
    """

    def __init__(self, patterns: str | Sequence[str]) -> None:
        self._patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self._left = set(self._patterns)

    def has(self, *names: str) -> bool:
        """Whether a pattern matches one of the names that a thing has."""
        matching = {p for p in self._patterns if any(fnmatch.fnmatchcase(name, p) for name in names)}
        self._left -= matching
        return bool(matching)

    @property
    def unmatched(self) -> list[str]:
        """The patterns that have matched nothing so far, sorted."""
        return sorted(self._left)

    def __str__(self) -> str:
        return ", ".join(map(repr, self._patterns))


class Strengths:
    """The strengths a user gave for the weights of one file, and which of the patterns have matched one.

    Example:
        >>> from peftkit.files.patterns import Strengths
        >>> strengths = Strengths({"attn.*": 0.5, "mlp.*": 2})
        >>> strengths.of("attn.q", default=1), strengths.of("norm", default=1)
        (0.5, 1)
        >>> strengths.unmatched
        ['mlp.*']
    """

    def __init__(self, given: Strength) -> None:
        patterns = given if isinstance(given, Mapping) else {"*": given}
        for value in patterns.values():
            require_strength(value)
        self._patterns = {pattern: float(value) for pattern, value in patterns.items()}
        self._left = set(given) if isinstance(given, Mapping) else set[str]()

    def of(self, *names: str, default: float) -> float:
        """The strength of a weight with these names: of the first pattern that matches one, the default without any."""
        for pattern, value in self._patterns.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                self._left.discard(pattern)
                return value
        return default

    @property
    def unmatched(self) -> list[str]:
        """The patterns that have matched nothing so far, sorted."""
        return sorted(self._left)
