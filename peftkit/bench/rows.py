"""The one schema of results: rows, and the machine and versions they were measured with.

A file is a JSON object: "format", "benchmark", "command", "date", then `environment` ("device", "processor",
"processors", "threads", "system", "versions"), then "rows", each with the fields of `Row` that are not empty.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from peftkit.bench.timing import Spread
from peftkit.errors import FileError, require_file

_PACKAGES = ("peftkit", "torch", "lycoris-lora", "peft", "triton", "numpy")
_FORMAT = 2
#: rows of format 1 are rows of format 2; the machine is described in other words
_READ = (1, _FORMAT)


@dataclass(frozen=True)
class Row:
    """One cell of a measurement.

    A comparison fills `reference` and `ratio`: how many times the reference each way took, in the same round. What is
    no ratio of times goes to `values`.
    """

    question: str
    kind: str
    case: str
    dtype: str = ""
    #: what takes 1, and how many milliseconds
    reference: str = ""
    reference_ms: float = 0.0
    ratio: dict[str, Spread] = field(default_factory=dict)
    #: MB: what is kept for backward (step), or the most that is held at a time
    memory: dict[str, float] = field(default_factory=dict)
    #: relative error of ours against float64; None where a measurement has no such error
    error: float | None = None
    #: other figures by name, as JSON holds them
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the cell in two files: all but its figures."""
        return self.question, self.kind, self.case, self.dtype, self.reference

    @property
    def against_best(self) -> float | None:
        """Ours over the best of the others; None without others."""
        others = [spread.median for way, spread in self.ratio.items() if way != "ours"]
        return self.ratio["ours"].median / min(others) if others else None


def environment(device: str) -> dict[str, Any]:
    """Return the machine and the versions that a figure depends on.

    Args:
        device: "cpu" or "cuda"; a GPU is described by its name.
    """
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def dump(rows: Sequence[Row], *, benchmark: str, device: str, command: str) -> str:
    """Return the JSON text of a results file: the rows, and where they were measured.

    Args:
        rows: what was measured.
        benchmark: the name of the measurement, such as "step".
        device: "cpu" or "cuda".
        command: what repeats the measurement.
    """
    header = {
        "format": _FORMAT,
        "benchmark": benchmark,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        **environment(device),
    }
    return json.dumps({**header, "rows": [_cell(row) for row in rows]}, indent=1, ensure_ascii=False) + "\n"


def read(path: Path) -> list[Row]:
    """Return the rows of a file that `dump` wrote.

    Raises:
        FileError: the file is not there, or is not of this schema.
    """
    try:
        found = json.loads(path.read_text())
        require_file(
            found["format"] in _READ, path, f"its format is {found['format']}, {_FORMAT} was expected: measure again"
        )
        return [
            Row(**{**cell, "ratio": {way: Spread(**spread) for way, spread in cell.get("ratio", {}).items()}})
            for cell in found["rows"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: not a file of peftkit bench ({error}); write one with --json") from error


def _cell(row: Row) -> dict[str, Any]:
    """A row as JSON holds it: no empty fields, four digits."""
    cell = {**asdict(row), "reference_ms": _digits(row.reference_ms)}
    cell["ratio"] = {way: {n: _digits(v) for n, v in asdict(spread).items()} for way, spread in row.ratio.items()}
    cell["error"] = None if row.error is None else _digits(row.error)
    if not row.reference:
        del cell["reference_ms"]
    required = ("question", "kind", "case")
    return {name: value for name, value in cell.items() if name in required or value not in ("", {}, None)}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
