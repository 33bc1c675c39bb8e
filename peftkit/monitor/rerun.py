"""Judge a logged run again, by another window or another rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peftkit.errors import OptionError
from peftkit.monitor.fluctuation import SecondValley
from peftkit.monitor.logs import Row


def replay(rows: Sequence[Row], rule: SecondValley) -> list[Row]:
    """Judge the rows of a run by another rule.

    Args:
        rows: Of one run, as `EarlyStopping.rows` or `read_run(path).rows`.
        rule: A new SecondValley, which sees every measurement.

    Returns:
        The same rows with this rule's fluctuation, valleys and turning point.

    Raises:
        OptionError: The rule has seen another run.

    Example:
        >>> rows = [pk.monitor.Row(step, cs=cs) for step, cs in enumerate((0.0, 1.0, 2.0, 3.0, 5.0))]
        >>> [row.fluctuation for row in pk.monitor.replay(rows, pk.monitor.SecondValley(2))]
        [None, None, None, None, 0.015625]
    """
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
