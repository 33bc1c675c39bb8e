"""spread: a budget divided among weights by what each of their ranks is worth."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

from torch import Tensor

from peftkit.errors import OptionError, require_integer, require_number


def spread(
    scores: Mapping[str, Sequence[float] | Tensor],
    cost: Mapping[str, float | Sequence[float]],
    budget: float,
    *,
    least: int = 0,
) -> dict[str, int]:
    """Divide a budget among weights: each rank goes where a score is highest for its cost.

    The result is a function of its arguments alone, and never costs more than the budget. Of scores that fall, Σ of
    those taken is the largest possible, but for what less than one rank costs. Beyond `least`, a rank that is worth
    nothing is not taken.

    Args:
        scores: weight -> what its first rank is worth, its second, …; it gets no more ranks than there are scores.
        cost: weight -> what one of its ranks costs, or what each of them does.
        budget: what all ranks may cost together, in the same unit.
        least: ranks that every weight gets before others get more, as far as it has scores.

    Returns:
        Weight -> its rank, in the order of `scores`.

    Raises:
        OptionError: a score or a cost is no finite number, a weight has no cost, or `least` ranks cost more than the
            budget.

    Example:
        >>> pk.training.spread({"a": [9, 4, 1], "b": [3, 2, 1]}, {"a": 1, "b": 1}, 4)
        {'a': 2, 'b': 2}
    """
    require_integer("least", least, 0, "an integer")
    require_number("budget", budget)
    values = {name: numbers(f"{name}: score", own) for name, own in scores.items()}
    costs = {name: _costs(name, cost.get(name), own) for name, own in values.items()}
    ranks = {name: min(least, len(own)) for name, own in values.items()}
    needed = sum(sum(costs[name][:rank]) for name, rank in ranks.items())
    if needed > budget:
        raise OptionError(f"budget={budget:g} was given, and {least} ranks for each weight cost {needed:g}")
    left = budget - needed
    waiting: list[tuple[float, int, str]] = []

    def wait(name: str, place: int) -> None:
        rank = ranks[name]
        if rank < len(values[name]) and values[name][rank] > 0:
            heapq.heappush(waiting, (-values[name][rank] / costs[name][rank], place, name))

    for place, name in enumerate(values):
        wait(name, place)
    while waiting:
        _, place, name = heapq.heappop(waiting)
        price = costs[name][ranks[name]]
        if price > left:
            continue  # nor its later ones, which need this one; a cheaper weight's may fit
        ranks[name] += 1
        left -= price
        wait(name, place)
    return ranks


def numbers(what: str, values: Sequence[float] | Tensor) -> list[float]:
    """Return finite numbers as a list.

    Args:
        what: they are, for the message.
        values: a sequence or a 1-d tensor.

    Raises:
        OptionError: they are something else.
    """
    given: object = values.tolist() if isinstance(values, Tensor) and not values.is_meta else values
    own = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Tensor)) else [None]
    found = [float(value) for value in own if isinstance(value, (Real, Tensor))]
    if len(found) < len(own):
        raise OptionError(f"{what}s={values!r} were given, a number for each rank was expected, as [2.0, 1.0]")
    if not all(map(math.isfinite, found)):
        raise OptionError(f"{what}s={found!r} were given, and one is not finite")
    return found


def _costs(name: str, cost: float | Sequence[float] | None, scores: Sequence[float]) -> Sequence[float]:
    """What each rank of a weight costs."""
    if cost is None:
        raise OptionError(f"{name}: cost has nothing for it, a number above 0 was expected")
    each = numbers(f"{name}: cost", [cost] * len(scores) if isinstance(cost, (int, float)) else cost)
    if len(each) < len(scores) or not all(own > 0 for own in each):
        raise OptionError(f"{name}: cost={cost!r} was given, a number above 0 for each rank was expected")
    return each
