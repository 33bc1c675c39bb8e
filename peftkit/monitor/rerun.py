"""A run that was logged, as another window or another rule sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peftkit.errors import OptionError
from peftkit.monitor.fluctuation import SecondValley
from peftkit.monitor.logs import Row


def replay(rows: Sequence[Row], rule: SecondValley) -> list[Row]:
    """The same rows with the fluctuation, the valleys and the turning point of this rule in place of their own."""
    if rule.fluctuation.count:
        raise OptionError("the rule has seen another run: a new one was expected")
    steps: list[int] = []
    seen: list[Row] = []
    for row in rows:
        if row.cs is None:
            seen.append(row)
            continue
        steps.append(row.step)
        before, valleys = rule.found, len(rule.valleys)
        rule.push(row.cs, row.lr)
        new = replace(row, fluctuation=rule.value, valley=None, turning_point=None)
        if len(rule.valleys) > valleys:
            new.valley = steps[rule.valleys[-1]]
        if rule.found is not None and before is None:
            new.turning_point = steps[rule.found.measurement]
        seen.append(new)
    return seen
