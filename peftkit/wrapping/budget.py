"""Ranks within a budget of bytes: which of those that weights could have are taken."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from peftkit.errors import OptionError, did_you_mean
from peftkit.wrapping.price import Price
from peftkit.wrapping.spread import numbers, spread

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
        # a step is worth less the larger the rank it leads to, whatever it costs
        worth = {name: [c / (prices[name].rank(i) or i) for i, c in enumerate(own, 1)] for name, own in steps.items()}
    else:
        worth = {name: _worth(name, scores, price) for name, price in prices.items()}
    least = min(own[0] for own in steps.values())
    if budget < least:
        raise OptionError(f"budget={budget} bytes were given, and the cheapest adapter takes {least}")
    ranks = spread(worth, steps, budget)
    if scores is None:
        return ranks, {name: _equal(prices[name].rank(step)) for name, step in ranks.items()}
    rates = {name: [w / c for w, c in zip(own, steps[name], strict=False)] for name, own in worth.items()}
    bar = min((rates[name][rank - 1] for name, rank in ranks.items() if rank), default=0.0)
    total = sum(sum(own) for own in worth.values()) or 1.0
    return ranks, {name: _reason(worth[name], rates[name], rank, bar, total) for name, rank in ranks.items()}


def _worth(name: str, scores: Mapping[str, Sequence[float] | Tensor], price: Price) -> list[float]:
    """What each step is worth: the ranks that it adds; the one to a full ΔW all that are left."""
    if not isinstance(scores, Mapping) or name not in scores:
        hint = did_you_mean(name, scores) if isinstance(scores, Mapping) else ""
        raise OptionError(f"{name}: scores has nothing for it.{hint} Score every target")
    own = [max(score, 0.0) for score in numbers(f"{name}: score", scores[name])]
    ends = [price.rank(step) for step in range(len(price.steps()) + 1)]
    return [sum(own[before:after]) for before, after in itertools.pairwise(ends)]


def _equal(rank: int | None) -> str:
    return f"{'full' if rank is None else f'rank {rank}'}: equal ranks, as far as they go"


def _reason(worth: Sequence[float], rates: Sequence[float], rank: int, bar: float, total: float) -> str:
    share = f"{sum(worth[:rank]) / total:.2%} of all that is worth anything" if rank else "nothing"
    if not any(worth[rank:]):
        return f"{share}; no further rank is worth anything"
    after = f"its next rank would be {rates[rank] / bar:.2f} of the last one taken, for the same bytes"
    return f"{share}; {after}"
