"""Measure how much a turning point says: how often a rule finds one in a random walk."""

from __future__ import annotations

import bisect
import functools
import random

from peftkit.monitor.fluctuation import SecondValley

_WALKS = 200
_LONGEST = 20  # windows
_WINDOW = 20  # the largest simulated: from about 5 on, windows differ in nothing


def chance(rule: SecondValley, windows: float) -> float:
    """Return the share of random walks in which a rule finds a turning point within so many windows.

    Args:
        rule: Its window, mode and hysteresis count; what it has seen does not.
        windows: How many windows of measurements.

    Returns:
        A share of 200 simulated walks, the same at every call.

    Example:
        >>> from peftkit.monitor.random_walk import chance
        >>> chance(pk.monitor.SecondValley(2), 1.0)
        0.0
    """
    found = _found(min(rule.fluctuation.window, _WINDOW), rule.mode, rule.factor)
    return bisect.bisect_right(found, windows + 1e-9) / _WALKS


@functools.cache
def _found(window: int, mode: str, factor: float) -> list[float]:
    """After how many windows the turning point shows, for every walk that has one, sorted."""
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
