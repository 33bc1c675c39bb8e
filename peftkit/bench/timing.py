"""Times that mean something on a noisy machine: contestants take turns, and only ratios within a turn count."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), cuts[0], cuts[-1])

    def rounded(self) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in vars(self).items()}


def contest(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 11, least: float = 0.02, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one figure per round; each round calls all of them in a random order.

    least: a figure is the mean over as many calls as take at least this many seconds.
    """
    repeats: dict[str, int] = {}
    for name, call in contestants.items():
        for _ in range(warmup):
            call()
        once = min(_timed(call, 1) for _ in range(2))
        repeats[name] = max(1, min(10_000, round(least / max(once, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order, draw = list(contestants), random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            draw.shuffle(order)
            for name in order:
                seconds[name].append(_timed(contestants[name], repeats[name]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


def ratios(seconds: Mapping[str, list[float]], to: str) -> dict[str, Spread]:
    """Every contestant's time over that of `to` in the same round."""
    return {
        name: Spread.of([a / b for a, b in zip(values, seconds[to], strict=True)])
        for name, values in seconds.items()
        if name != to
    }


def _timed(call: Callable[[], object], repeats: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
