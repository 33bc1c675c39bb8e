"""Ranks within a budget of bytes: what each rank of each weight costs, and which are taken."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from peftkit.errors import OptionError, did_you_mean
from peftkit.wrapping.spread import spread

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(budget: int | str) -> int:
    """Return a number of bytes that is given as such, or as "5MB" or "300 KiB".

    Raises:
        OptionError: it is no such number, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(budget))
    factor = _UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * factor) if found and factor else 0
    if isinstance(budget, bool) or size <= 0:
        raise OptionError(f"budget={budget!r} was given, a number of bytes or a size as '5MB' was expected")
    return size


@dataclass(frozen=True)
class Price:
    """What an adapter on one weight costs, in bytes.

    Attributes:
        first: with one rank.
        more: of each further rank.
        most: the largest rank that its kind can have on the weight.
        full: of a ΔW of every number.
    """

    first: int
    more: int
    most: int
    full: int

    def steps(self) -> list[int]:
        """Return what each rank costs; the last one makes it a full ΔW, if ranks would cost as much before `most`."""
        count = min(self.most, 1 + max(0, (self.full - 1 - self.first) // self.more))
        each = [self.first] + [self.more] * (count - 1)
        if self.first >= self.full:
            return [self.full]
        return each + ([self.full - sum(each)] if count < self.most else [])

    def is_full(self, rank: int) -> bool:
        """Return whether that many steps make it a full ΔW."""
        steps = self.steps()
        return rank == len(steps) and sum(steps) == self.full


def divide(
    prices: Mapping[str, Price], budget: int, scores: Mapping[str, Sequence[float] | Tensor] | None
) -> tuple[dict[str, int], dict[str, str]]:
    """Return the steps that each weight gets, as in `Price.steps`, and the reason for each.

    Args:
        prices: of every weight.
        budget: in bytes.
        scores: weight -> what each of its ranks is worth; None for as equal ranks as the budget allows.

    Raises:
        OptionError: a weight has no scores, or the budget is less than the cheapest rank.
    """
    steps = {name: price.steps() for name, price in prices.items()}
    if scores is None:
        worth = {name: [cost / (1 + i) for i, cost in enumerate(own)] for name, own in steps.items()}
    else:
        worth = {name: _worth(name, scores, own, prices[name]) for name, own in steps.items()}
    least = min(own[0] for own in steps.values())
    if budget < least:
        raise OptionError(f"budget={budget} bytes were given, and the cheapest adapter of one rank takes {least}")
    ranks = spread(worth, steps, budget)
    if scores is None:
        return ranks, {name: f"rank {rank}: equal ranks, as far as they go" for name, rank in ranks.items()}
    rates = {name: [w / c for w, c in zip(own, steps[name], strict=False)] for name, own in worth.items()}
    bar = min((rates[name][rank - 1] for name, rank in ranks.items() if rank), default=0.0)
    total = sum(sum(own) for own in worth.values()) or 1.0
    return ranks, {name: _reason(worth[name], rates[name], rank, bar, total) for name, rank in ranks.items()}


def _worth(
    name: str, scores: Mapping[str, Sequence[float] | Tensor], steps: Sequence[int], price: Price
) -> list[float]:
    """What each step is worth; the one to a full ΔW all that is left."""
    if name not in scores:
        raise OptionError(f"{name}: scores has nothing for it.{did_you_mean(name, scores)} Score every target")
    own = [max(float(score), 0.0) for score in scores[name]]
    if not all(map(math.isfinite, own)):
        raise OptionError(f"{name}: a score is not finite")
    if price.is_full(len(steps)) and len(own) > len(steps) - 1:
        return [*own[: len(steps) - 1], sum(own[len(steps) - 1 :])]
    return own[: len(steps)]


def _reason(worth: Sequence[float], rates: Sequence[float], rank: int, bar: float, total: float) -> str:
    share = f"{sum(worth[:rank]) / total:.2%} of all that is worth anything" if rank else "nothing"
    if not any(worth[rank:]):
        return f"{share}; no further rank is worth anything"
    after = f"its next rank would be {rates[rank] / bar:.2f} of the last one taken, for the same bytes"
    return f"{share}; {after}"
