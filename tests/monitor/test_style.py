"""Pictures can be read: nothing overlaps, every curve is in one legend, and bad formats are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from peftkit.errors import OptionError
from peftkit.monitor.logs import Row
from peftkit.monitor.plot import draw
from peftkit.monitor.style import PALETTE, WIDTH, legend_below, save, styled, ticks_at


def run(steps: int = 60) -> list[Row]:
    """A run that turns at step 20, which is known at step 30, with a loss noted every six steps."""
    rows = [Row(step, cs=-0.015 + 1e-4 * step, fluctuation=1e-8 * (1 + step % 9)) for step in range(1, steps + 1)]
    rows[29].turning_point = 20
    rows[14].valley = 12
    for row in rows[::6]:
        row.noted["held_out"] = 0.2 + 1e-3 * row.step
    return rows


def words(figure: Figure) -> list[Bbox]:
    """Where every tick label, axis label, title and legend of a figure is."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
    for axes in figure.axes:
        labels = [axes.xaxis.label, axes.yaxis.label, axes.title]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            labels += [label for t in ticks if low <= t.get_loc() <= high for label in (t.label1, t.label2)]
        boxes += [label.get_window_extent(renderer) for label in labels if label.get_visible() and label.get_text()]
    return boxes


def test_nothing_in_a_picture_of_a_run_overlaps() -> None:
    figure = draw(run(), 5)
    assert len(figure.legends) == 1
    boxes = words(figure)
    assert len(boxes) > 12
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    legend = figure.legends[0].get_window_extent()
    assert not any(axes.bbox.overlaps(legend) for axes in figure.axes)


def test_every_curve_is_in_the_legend_once() -> None:
    figure = draw(run())
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == [
        "CS",
        "fluctuation of CS",
        "held out",
        "known at step 30",
        "turning point, step 20",
        "valleys",
    ]


def test_a_figure_without_labels_has_no_legend() -> None:
    figure = Figure(layout="constrained")
    figure.subplots().plot([1, 2])
    legend_below(figure, columns=2)
    assert figure.legends == []


def test_the_look_ends_with_its_block() -> None:
    before = dict(rcParams)
    with styled():
        figure = Figure(figsize=(WIDTH, 2))
        axes = figure.subplots()
        lines = [axes.plot([1, 2])[0] for _ in PALETTE]
    assert tuple(line.get_color() for line in lines) == PALETTE
    assert len({line.get_marker() for line in lines}) == len(PALETTE)
    assert dict(rcParams) == before


def test_ticks_are_where_sizes_are() -> None:
    axes = Figure().subplots()
    axes.set_xscale("log")
    ticks_at(axes.xaxis, (0.1, 8, 512, 4096))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "8", "512", "4k"]
    assert list(axes.xaxis.get_minorticklocs()) == []


def test_a_format_that_matplotlib_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"a\.xyz"):
        save(Figure(), tmp_path / "a.xyz")
