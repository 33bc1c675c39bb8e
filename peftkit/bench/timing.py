"""Times that mean something on a noisy machine: contestants take turns, and only ratios within a turn count."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from peftkit.errors import BenchError

#: what a contestant does once
Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of figures, of which there is at least one."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), cuts[0], cuts[-1])

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(self.p10)}–{_digits(self.p90)})"


def _digits(value: float) -> str:
    """Three significant digits without an exponent, as far as two decimals."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def contest(
    contestants: Mapping[str, Call],
    *,
    rounds: int = 11,
    least: float = 0.02,
    prepare: Mapping[str, Call] | None = None,
) -> dict[str, list[float]]:
    """Return seconds per call of every contestant, one figure per round; a round calls all in a random order.

    Args:
        contestants: calls by name.
        rounds: how often every contestant takes its turn.
        least: a figure is the mean over as many calls as take at least this many seconds.
        prepare: by name of a contestant, what to do before its call without counting it; such a contestant is called
            once a round.
    """
    prepare = prepare or {}
    repeats: dict[str, int] = {}
    for name, call in contestants.items():
        if name in prepare:
            repeats[name] = 1
            continue
        _timed(call, 2)
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
                if name in prepare:
                    prepare[name]()
                seconds[name].append(_timed(contestants[name], repeats[name]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


def gpu_contest(contestants: Mapping[str, Call], *, rounds: int = 11) -> dict[str, list[float]]:
    """Return seconds of the GPU per call of every contestant, one figure per round, as `contest` has them.

    Every call follows a write that is larger than any cache. The write also keeps the GPU busy while the host enqueues
    the call, so that the host's own time does not count.

    Args:
        contestants: calls by name.
        rounds: how often every contestant takes its turn.
    """
    cache = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order, draw = list(contestants), random.Random(0)
    for call in contestants.values():
        call()
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            contestants[name]()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(1e-3 * start.elapsed_time(end))
    return seconds


def ratios(seconds: Mapping[str, list[float]], reference: list[float]) -> dict[str, Spread]:
    """Return every contestant's time over that of the reference in the same round."""
    return {
        name: Spread.of([a / b for a, b in zip(values, reference, strict=True)]) for name, values in seconds.items()
    }


def peak_bytes(call: Call, device: str) -> int:
    """Return the most bytes that one call holds at a time, beyond what was held before it.

    Args:
        call: made once.
        device: "cpu", where PyTorch's own allocations count, or "cuda".
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    kineto = profile.profiler.kineto_results if profile.profiler is not None else None
    assert kineto is not None
    changes = sorted(
        (event.start_ns(), cast(Any, event).nbytes()) for event in kineto.events() if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _timed(call: Call, repeats: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def require_accurate(what: str, error: float, bound: float) -> None:
    """Raise BenchError unless the relative error of what is to be timed, against float64, is below a bound."""
    if not error < bound:  # NaN is below none
        raise BenchError(
            f"{what}: a relative error of {error:.1e} was found, below {bound:.0e} was expected; nothing was timed"
        )
