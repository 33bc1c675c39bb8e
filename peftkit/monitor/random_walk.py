"""What a rule finds in a random walk: the measure of how much its finding says."""

from __future__ import annotations

import bisect
import functools
import random

from peftkit.monitor.fluctuation import SecondValley

_WALKS = 200
_LONGEST = 20  # windows
_WINDOW = 20  # the largest simulated: from about 5 on, windows differ in nothing


def chance(rule: SecondValley, windows: float) -> float:
    """The share of random walks in which a rule like this one finds its turning point in at most so many windows."""
    found = _found(min(rule.fluctuation.window, _WINDOW), rule.mode, rule.factor)
    return bisect.bisect_right(found, windows + 1e-9) / _WALKS


@functools.cache
def _found(window: int, mode: str, factor: float) -> list[float]:
    """After how many windows each of the walks that have a turning point shows it, sorted."""
    generator = random.Random(0)
    found = []
    for _ in range(_WALKS):
        hysteresis = factor - 1 if mode == "robust" else None
        rule, cs = SecondValley(window, mode=mode, hysteresis=hysteresis, norm="none"), 0.0
        for t in range(_LONGEST * window):
            cs += generator.gauss(0, 1)
            if rule.push(cs) is not None:
                found.append((t + 1) / window)
                break
    return sorted(found)
