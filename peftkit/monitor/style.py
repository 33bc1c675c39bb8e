"""One look for every picture of the project: readable at a width of 800 pixels, colours that colour-blind readers see.

The colours are the palette of Okabe and Ito (https://jfly.uni-koeln.de/color), in an order in which neighbours also
differ in brightness; curves differ in their markers too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#767676",
)
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")

#: inches; shown at 800 pixels, one point is 1.4 pixels
WIDTH = 8.0
DPI = 200


@contextmanager
def styled() -> Iterator[None]:
    """Give figures that are made in the block, or in a function decorated with it, the project's look.

    Raises:
        OptionError: matplotlib is not installed.

    Example:
        >>> with styled():  # doctest: +SKIP
        ...     figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    """
    try:
        from matplotlib import rc_context
        from matplotlib.rcsetup import cycler
    except ImportError as error:
        raise OptionError(
            "matplotlib is not installed, which plots are drawn with: pip install 'peftkit[plot]'"
        ) from error
    with rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 4.5,
            "axes.prop_cycle": cycler(color=PALETTE, marker=MARKERS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.7,
            "axes.axisbelow": True,
            "savefig.dpi": DPI,
            "savefig.facecolor": "white",
            "svg.hashsalt": "peftkit",
        }
    ):
        yield


def legend_below(figure: Figure, columns: int) -> None:
    """Put one legend under all axes of a figure with constrained layout: every labelled curve once, by its label."""
    named = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        figure.legend([*named.values()], [*named], loc="outside lower center", ncols=min(columns, len(named)))


def ticks_at(axis: Axis, values: Sequence[float]) -> None:
    """Label a logarithmic axis at these values alone, as 0.1, 8, 512, 2k.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`, already logarithmic.
        values: Where to put ticks.
    """
    axis.set_ticks(values, [f"{value // 1024}k" if value % 1024 == 0 else f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format that the name of the file ends in.

    Raises:
        OptionError: matplotlib does not know the format.
    """
    try:
        figure.savefig(path, dpi=DPI)
    except ValueError as error:
        raise OptionError(f"{path}: {error}") from error
