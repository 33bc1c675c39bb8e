"""Rows shown: as a table, beside the rows of another file, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from peftkit.bench.rows import Row
from peftkit.bench.timing import Spread
from peftkit.errors import FileError
from peftkit.monitor.style import WIDTH, legend_below, save, styled

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def table(rows: Sequence[Row], title: str = "") -> Table:
    """Return a table of comparisons, a line for every way of every row; it fits a terminal of 80 columns.

    Args:
        rows: rows with ratios.
        title: put before the name of the reference.
    """
    references = ", ".join(dict.fromkeys(row.reference for row in rows))
    shown = _table("kind", "dtype", "way", "ratio", "ms", "MB", "error", title=f"{title}: 1 = {references}")
    for row in rows:
        frozen = {"frozen": Spread(1.0, 1.0, 1.0)} if "frozen" in row.memory else {}
        for i, (way, spread) in enumerate((row.ratio | frozen).items()):
            memory = f"{row.memory[way]:.3g}" if way in row.memory else ""
            error = f"{row.error:.0e}" if way == "ours" and row.error is not None else ""
            own = (row.kind, row.case, _SHORT.get(row.dtype, row.dtype)) if i == 0 else ("", "", "")
            milliseconds = f"{spread.median * row.reference_ms:.3g}"
            shown.add_row(*own, way, f"{spread.median:.2f}", milliseconds, memory, error)
    return shown


def figures(rows: Sequence[Row], title: str = "") -> Table:
    """Return a table of the values of rows, a line for every value.

    Args:
        rows: rows with values; names of values may be of any length, since they wrap between words.
        title: put above the table.
    """
    shown = Table("kind", "case", "what", "value", title=title or None, box=box.SIMPLE_HEAD, collapse_padding=True)
    for row in rows:
        for i, (name, value) in enumerate(_flat(row.values)):
            shown.add_row(*((row.kind, row.case) if i == 0 else ("", "")), name, _brief(value))
    return shown


def compared(before: Sequence[Row], after: Sequence[Row]) -> list[Table]:
    """Return tables of ours in two files, one for each question: the ratios to the same reference, and their ratio.

    Args:
        before: rows of one file.
        after: rows of the other; only cells of both files are shown.

    Raises:
        FileError: the files have no cell in common.
    """
    known = {row.key: row for row in before if "ours" in row.ratio}
    shown: dict[str, Table] = {}
    for row in after:
        old = known.get(row.key)
        if old is None or "ours" not in row.ratio:
            continue
        a, b = old.ratio["ours"], row.ratio["ours"]
        # Beyond what either file itself spreads over, the change is more than noise
        apart = b.p10 > a.p90 or b.p90 < a.p10
        change = f"{b.median / a.median:.2f}{'' if apart else ' ~'}"
        if row.question not in shown:
            shown[row.question] = _table("kind", "dtype", "before", "after", "change", title=row.question)
        shown[row.question].add_row(row.kind, row.case, _SHORT.get(row.dtype, row.dtype), str(a), str(b), change)
    if not shown:
        raise FileError("the two files have no cell in common: same questions, kinds, layers and dtypes were expected")
    return list(shown.values())


@styled()
def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a bar for every way of every row, with the legend under the axes. Needs matplotlib.

    Args:
        rows: rows with ratios.
        path: the picture's file.
    """
    from matplotlib.figure import Figure

    ways = list(dict.fromkeys(way for row in rows for way in row.ratio))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.22 * len(rows) * len(ways)), layout="constrained")
    axes = figure.subplots()
    for j, way in enumerate(ways):
        own = [(i + 0.8 * j / len(ways), row.ratio[way]) for i, row in enumerate(rows) if way in row.ratio]
        low = [spread.median - spread.p10 for _, spread in own]
        high = [spread.p90 - spread.median for _, spread in own]
        bars = axes.barh(
            [at for at, _ in own], [s.median for _, s in own], 0.8 / len(ways), xerr=[low, high], align="edge"
        )
        bars.set_label(way)
    axes.axvline(1, color="black", linewidth=0.8, marker="")
    axes.grid(visible=False, axis="y")
    axes.set_yticks([i + 0.4 for i in range(len(rows))], [f"{r.question} {r.kind} {r.case} {r.dtype}" for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel(" / ".join(dict.fromkeys(row.reference for row in rows)) + " = 1")
    legend_below(figure, columns=4)
    save(figure, path)


def _table(*columns: str, title: str = "") -> Table:
    """A table whose columns keep their width but for "layer", which wraps between words and comes before "dtype"."""
    shown = Table(title=title or None, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in columns:
        if name == "dtype":
            shown.add_column("layer", min_width=10)
        shown.add_column(name, no_wrap=True, justify="right" if name in ("ratio", "ms", "MB") else "left")
    return shown


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, those of an inner dictionary with its name before theirs."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}, ")
        else:
            yield f"{before}{name}", value


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
