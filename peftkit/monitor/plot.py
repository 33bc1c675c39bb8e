"""The picture of a run: CS, its fluctuation with valleys and turning point, and what was noted beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import OptionError
from peftkit.monitor.logs import Row
from peftkit.monitor.style import BLUE, GREEN, GREY, ORANGE, RED, WIDTH, legend_below, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CS, _FLUCTUATION, _NOTED, _POINT = BLUE, GREEN, ORANGE, RED
_DASHES = ("-", "--", ":", "-.")


@styled()
def draw(rows: Sequence[Row], window: int | None = None, *, path: str | Path | None = None, title: str = "") -> Any:
    """Draw a run: CS and what was noted above, the fluctuation of CS below, the legend under both.

    Args:
        rows: The measurements of a run, as `EarlyStopping.rows` or `read_run(path).rows`.
        window: Measurements in a window of the rule, which the title then states.
        path: Where to write the picture (.png, .svg, .pdf).
        title: Above the picture, in place of "CS-Fluctuation".

    Returns:
        A matplotlib Figure.

    Raises:
        OptionError: The run holds no measurement, matplotlib is not installed, or the format is unknown.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    beside = panel(above, below, rows)
    above.set_title((title or "CS-Fluctuation") + (f", windows of {window} measurements" if window else ""), loc="left")
    above.set_ylabel("CS, the mean cosine of ΔW and W")
    below.set_ylabel("fluctuation")
    below.set_xlabel("optimiser steps")
    if beside is not None:
        beside.set_ylabel("noted")
    legend_below(figure, columns=3)
    if path is not None:
        save(figure, path)
    return figure


def panel(above: Axes, below: Axes, rows: Sequence[Row], *, names: bool = True) -> Axes | None:
    """Draw a run into two axes that share their steps.

    Args:
        above: Axes for CS and, on a scale of its own, for what was noted.
        below: Axes for the fluctuation, its valleys and the turning point.
        rows: The measurements of a run.
        names: Whether the turning point and its discovery are labelled with their steps, or in general words, so that
            several runs can share a legend.

    Returns:
        The axes of what was noted, None if nothing was.

    Raises:
        OptionError: The run holds no measurement.
    """
    measured = [row for row in rows if row.cs is not None]
    if not measured:
        raise OptionError("there is no measurement to draw: the run has made no full interval of steps yet")
    above.plot([row.step for row in measured], [row.cs or 0.0 for row in measured], color=_CS, marker="", label="CS")
    beside = _noted(above, rows)
    fluctuating = [row for row in measured if row.fluctuation is not None and row.fluctuation > 0]
    below.plot(
        [row.step for row in fluctuating],
        [row.fluctuation or 0.0 for row in fluctuating],
        color=_FLUCTUATION,
        marker="",
        label="fluctuation of CS",
    )
    if fluctuating:
        below.set_yscale("log")
    value = {row.step: row.fluctuation for row in measured}
    valleys = {row.valley: height for row in measured if row.valley is not None and (height := value.get(row.valley))}
    below.plot([*valleys], [*valleys.values()], "v", color=_FLUCTUATION, ms=6, label="valleys" if valleys else "")
    found = next((row for row in measured if row.turning_point is not None), None)
    if found is not None and found.turning_point is not None:
        point, known = "turning point", "where it was known"
        if names:
            point, known = f"turning point, step {found.turning_point}", f"known at step {found.step}"
        for axes in (above, below):
            axes.axvline(found.turning_point, color=_POINT, lw=1.4, marker="", label=point)
            axes.axvline(found.step, color=GREY, lw=1.2, ls=":", marker="", label=known)
    return beside


def _noted(above: Axes, rows: Sequence[Row]) -> Axes | None:
    """A second scale with a curve for every name that was noted."""
    noted: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.noted.items():
            at, values = noted.setdefault(name, ([], []))
            at.append(row.step)
            values.append(value)
    if not noted:
        return None
    beside = above.twinx()
    beside.grid(visible=False)
    beside.spines["right"].set_visible(True)
    for i, (name, (at, values)) in enumerate(noted.items()):
        beside.plot(at, values, color=_NOTED, marker="", ls=_DASHES[i % len(_DASHES)], label=name.replace("_", " "))
    return beside
