"""What a measurement says: one row per kind, layer and dtype, whatever was measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from peftkit.bench.timing import Spread
from peftkit.errors import FileError
from peftkit.monitor.style import WIDTH, legend_below, save, styled

_PACKAGES = ("peftkit", "torch", "lycoris-lora", "peft", "triton", "numpy")
_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One cell: how many times the reference each way took, in the same round."""

    question: str
    kind: str
    case: str
    dtype: str
    #: what takes 1, and how many milliseconds
    reference: str
    reference_ms: float
    ratio: dict[str, Spread]
    #: MB: what is kept for backward (step), or the most that is held at a time
    memory: dict[str, float] = field(default_factory=dict)
    #: of ours against float64, relative
    error: float = 0.0

    @property
    def key(self) -> tuple[str, ...]:
        return self.question, self.kind, self.case, self.dtype, self.reference

    @property
    def against_best(self) -> float | None:
        """Ours over the best of the others; None without others."""
        others = [spread.median for way, spread in self.ratio.items() if way != "ours"]
        return self.ratio["ours"].median / min(others) if others else None


def environment(device: str) -> dict[str, Any]:
    """Versions and the machine: what a figure depends on."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device != "cpu" else f"{_processor()}, {torch.get_num_threads()} threads"
    return {"device": name, "system": platform.platform(), "processors": os.cpu_count(), "versions": versions}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def dump(rows: Sequence[Row], device: str, command: str) -> str:
    """The rows and where they were measured, as JSON."""
    cells = [{**asdict(row), "ratio": {way: _short(spread) for way, spread in row.ratio.items()}} for row in rows]
    for cell in cells:
        cell["reference_ms"], cell["error"] = _digits(cell["reference_ms"]), _digits(cell["error"])
    return json.dumps({"format": _FORMAT, "command": command, **environment(device), "rows": cells}, indent=1) + "\n"


def read(path: Path) -> list[Row]:
    """The rows of a file that `dump` wrote."""
    try:
        found = json.loads(path.read_text())
        if found["format"] != _FORMAT:
            raise FileError(f"{path}: its format is {found['format']}, {_FORMAT} was expected: measure again")
        return [
            Row(**{**cell, "ratio": {way: Spread(**spread) for way, spread in cell["ratio"].items()}})
            for cell in found["rows"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path}: not a file of peftkit bench ({error}); write one with --json") from error


def table(rows: Sequence[Row], title: str = "") -> Table:
    """For rich to print."""
    ways = list(dict.fromkeys(way for row in rows for way in row.ratio))
    shown = Table("kind", "layer", "dtype", "1 =", "ms", *ways, "MB", "error", title=title or None)
    for row in rows:
        cells = [f"{row.ratio[way].median:.2f}" if way in row.ratio else "" for way in ways]
        memory = "/".join(f"{row.memory[way]:.3g}" for way in ways if way in row.memory)
        shown.add_row(
            row.kind, row.case, row.dtype, row.reference, f"{row.reference_ms:.3g}", *cells, memory, f"{row.error:.0e}"
        )
    return shown


def compared(before: Sequence[Row], after: Sequence[Row]) -> Table:
    """Ours in two files, cell by cell: the ratios to the same reference, and their ratio."""
    known = {row.key: row for row in before}
    shown = Table("question", "kind", "layer", "dtype", "before", "after", "after / before")
    for row in after:
        old = known.get(row.key)
        if old is None:
            continue
        a, b = old.ratio["ours"], row.ratio["ours"]
        # Beyond what either file itself spreads over, the change is more than noise
        apart = b.p10 > a.p90 or b.p90 < a.p10
        shown.add_row(
            row.question,
            row.kind,
            row.case,
            row.dtype,
            str(a),
            str(b),
            f"{b.median / a.median:.2f}{'' if apart else ' ~'}",
        )
    if not shown.row_count:
        raise FileError("the two files have no cell in common: same questions, kinds, layers and dtypes were expected")
    return shown


@styled()
def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a bar for every way of every row, with the legend under the axes. Needs matplotlib."""
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


def _short(spread: Spread) -> dict[str, float]:
    return {name: _digits(value) for name, value in asdict(spread).items()}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
