"""The picture of a run: CS, its fluctuation with valleys and turning point, and what was noted beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import OptionError
from peftkit.monitor.logs import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CS, _F, _NOTED, _POINT = "#1f5a99", "#8a3ffc", "#c25a00", "#c62828"


def draw(rows: Sequence[Row], window: int | None = None, *, path: str | Path | None = None, title: str = "") -> Any:
    """A matplotlib Figure, written to `path` if one is given (.png, .svg, .pdf)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "matplotlib is not installed, which plots are drawn with: pip install 'peftkit[plot]'"
        ) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    panel(above, below, rows)
    heading = title or "CS-Fluctuation"
    above.set_title(heading + (f", windows of {window} measurements" if window else ""), loc="left", fontsize=11)
    below.set_xlabel("optimiser steps")
    if path is not None:
        try:
            figure.savefig(path, dpi=120)
        except ValueError as error:  # of a suffix that matplotlib does not know
            raise OptionError(f"{path}: {error}") from error
    return figure


def panel(above: Axes, below: Axes, rows: Sequence[Row], *, names: bool = True) -> None:
    """Draw a run into two axes that share their steps. names: label the axes and curves."""
    measured = [row for row in rows if row.cs is not None]
    if not measured:
        raise OptionError("there is no measurement to draw: the run has made no full interval of steps yet")
    steps = [row.step for row in measured]
    above.plot(steps, [row.cs or 0.0 for row in measured], color=_CS, lw=1.4)
    noted: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.noted.items():
            at, values = noted.setdefault(name, ([], []))
            at.append(row.step)
            values.append(value)
    if noted:
        beside = above.twinx()
        for i, (name, (at, values)) in enumerate(noted.items()):
            beside.plot(at, values, color=_NOTED, lw=1.4, ls=("-", "--", ":", "-.")[i % 4], label=name)
        beside.tick_params(axis="y", labelcolor=_NOTED)
        if names:
            beside.legend(loc="best", fontsize=8, frameon=False)
    fluctuating = [row for row in measured if row.fluctuation is not None and row.fluctuation > 0]
    below.plot([r.step for r in fluctuating], [r.fluctuation or 0.0 for r in fluctuating], color=_F, lw=1.4)
    if fluctuating:
        below.set_yscale("log")
    value = {row.step: row.fluctuation for row in measured}
    valleys = {row.valley: height for row in measured if row.valley is not None and (height := value.get(row.valley))}
    below.plot([*valleys], [*valleys.values()], "v", color=_F, ms=6, label="valleys", ls="")
    found = next((row for row in measured if row.turning_point is not None), None)
    if found is not None and found.turning_point is not None:
        for axes in (above, below):
            axes.axvline(found.turning_point, color=_POINT, lw=1.2)
            axes.axvline(found.step, color=_POINT, lw=0.8, ls=":")
    if names:
        above.set_ylabel("CS", color=_CS)
        below.set_ylabel("fluctuation", color=_F)
        if found is not None:
            below.plot([], [], color=_POINT, lw=1.2, label=f"turning point, step {found.turning_point}")
            below.plot([], [], color=_POINT, lw=0.8, ls=":", label=f"known at step {found.step}")
        if valleys or found is not None:
            below.legend(loc="upper right", fontsize=8, frameon=False)
