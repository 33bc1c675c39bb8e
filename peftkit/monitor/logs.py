"""Where measurements go: JSON lines, CSV, TensorBoard, a line in the terminal, or any function of a row."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from peftkit.errors import FileError, OptionError
from peftkit.monitor.record import Record


@dataclass
class Row:
    """Holds one line of a run: a measurement, or numbers that were noted beside measurements.

    Attributes:
        step: The optimiser steps before it.
        cs: The mean cosine of ΔW and W, None where numbers were only noted.
        ratio: The mean of ‖ΔW‖/‖W‖.
        fluctuation: What the rule makes of the measurement, F for SecondValley.
        lr: The learning rate.
        valley: The step of a valley that this measurement made known.
        turning_point: The step of the turning point, in the row that made it known.
        noted: Numbers by name.
        settings: The options of the run, in its first row only.
        record: The measurement weight by weight, which logs receive and `EarlyStopping.rows` leaves out.
    """

    step: int
    cs: float | None = None
    ratio: float | None = None
    fluctuation: float | None = None
    lr: float | None = None
    valley: int | None = None
    turning_point: int | None = None
    noted: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    record: Record | None = None

    def without_record(self) -> Row:
        """Return the same row without the record."""
        return replace(self, record=None)


Log = str | Path | Callable[[Row], object] | Any

#: names of a line of a log that nothing else may take
RESERVED = frozenset(f.name for f in fields(Row)) | {"gradient", "modules", "alone", "effective_rank", "stable_rank"}

_COLUMNS = ("step", "cs", "ratio", "fluctuation", "lr", "valley", "turning_point")


def log_to(targets: Log | Iterable[Log]) -> list[Callable[[Row], object]]:
    """Return a function of a row for every path, SummaryWriter or function."""
    one = isinstance(targets, (str, Path)) or callable(targets) or hasattr(targets, "add_scalar")
    several = [targets] if one or not isinstance(targets, Iterable) else targets
    return [_log(target) for target in several]


def _log(target: Log) -> Callable[[Row], object]:
    if isinstance(target, (str, Path)):
        path = Path(target)
        if path.suffix == ".jsonl":
            return JsonLines(path)
        if path.suffix == ".csv":
            return Csv(path)
        raise OptionError(f"log={str(target)!r} was given, a name that ends in .jsonl or .csv was expected")
    if hasattr(target, "add_scalar"):
        return TensorBoard(target)
    if callable(target):
        return target
    raise OptionError(f"log={target!r} was given, a path, a SummaryWriter or a function of a row was expected")


def _ready(path: str | Path) -> Path:
    """The path, whose folder is made if need be."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path}: its folder cannot be made: {error}") from error
    return path


class JsonLines:
    """Appends every row to a file as one JSON object, flushed at once.

    Where they are measured, the norm of the whole gradient and the mean ranks of ΔW are written too.

    Args:
        path: The file, whose folder is made if need be. Rows go to its end.
        modules: Write cos(ΔW, W), ‖ΔW‖ and ‖ΔW‖/‖W‖ of every weight.

    Raises:
        FileError: The folder cannot be made.

    Example:
        >>> log = pk.monitor.JsonLines("run.jsonl")
        >>> log(pk.monitor.Row(step=20, cs=0.01, ratio=0.002))
        >>> print(log.path.read_text().strip())
        {"step": 20, "cs": 0.01, "ratio": 0.002}
    """

    def __init__(self, path: str | Path, *, modules: bool = False) -> None:
        self.path, self.modules = _ready(path), modules
        if self.path.is_file() and (written := self.path.read_bytes()) and not written.endswith(b"\n"):
            with self.path.open("ab") as file:  # a line that a crash cut off stays alone
                file.write(b"\n")

    def __call__(self, row: Row) -> None:
        values = {f.name: getattr(row, f.name) for f in fields(row) if f.name not in ("record", "noted")}
        line = {key: value for key, value in values.items() if value not in (None, {})} | row.noted
        if row.record is not None:
            r = row.record
            if r.gradients:
                line["gradient"] = math.sqrt(math.fsum(g * g for g in r.gradients.values()))
            if r.spectra:
                for key in ("effective_rank", "stable_rank"):
                    line[key] = math.fsum(getattr(s, key) for s in r.spectra.values()) / len(r.spectra)
            if self.modules:
                line["modules"] = {site: [r.per_module[site], r.norms[site], r.ratios[site]] for site in r.per_module}
            if r.alone:
                line["alone"] = {name: one.cs for name, one in r.alone.items()}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


class Csv:
    """Appends measurements to a CSV file, one a line, under a line of names.

    Args:
        path: The file, whose folder is made if need be.

    Raises:
        FileError: The folder cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _ready(path)

    def __call__(self, row: Row) -> None:
        if row.cs is None:
            return
        new = not self.path.is_file() or self.path.stat().st_size == 0
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(_COLUMNS)
            writer.writerow(["" if (v := getattr(row, name)) is None else v for name in _COLUMNS])


class TensorBoard:
    """Writes rows to TensorBoard, as scalars under monitor/.

    Args:
        writer: A torch.utils.tensorboard.SummaryWriter, or any object with its `add_scalar`.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, row: Row) -> None:
        values = {name: getattr(row, name) for name in ("cs", "ratio", "fluctuation", "turning_point")} | row.noted
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(f"monitor/{name}", value, row.step)


class LiveLine:
    """Shows where the run is in one line of the terminal. Use it in a `with` block, or call `close`.

    Args:
        console: A rich Console, by default one on stderr.

    Example:
        >>> with pk.monitor.LiveLine() as line:  # doctest: +SKIP
        ...     stopper = pk.monitor.EarlyStopping(model, optimizer=optimizer, log=line)
        ...     train(model, optimizer)
    """

    def __init__(self, console: Console | None = None) -> None:
        self._live = Live(console=console or Console(stderr=True), transient=False)
        self._found: int | None = None
        self._valleys = 0

    def __enter__(self) -> LiveLine:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last line in the terminal as it is."""
        self._live.stop()

    def __call__(self, row: Row) -> None:
        if row.cs is None:
            return
        self._valleys += row.valley is not None
        self._found = row.turning_point if row.turning_point is not None else self._found
        parts = [f"step {row.step}", f"CS {row.cs:+.5f}", f"‖ΔW‖/‖W‖ {row.ratio:.4f}"]
        parts.append("fluctuation …" if row.fluctuation is None else f"fluctuation {row.fluctuation:.2e}")
        parts.append(f"{self._valleys} valley{'' if self._valleys == 1 else 's'}")
        if self._found is not None:
            parts.append(f"turning point at step {self._found}")
        self._live.update(Text("   ".join(parts)), refresh=True)


@dataclass(frozen=True)
class RunLog:
    """Holds what a .jsonl log says of a run.

    Attributes:
        settings: The options of the run by name.
        rows: Measurements and what was noted beside them, by step.
    """

    settings: dict[str, Any]
    rows: list[Row]


def read_run(path: str | Path) -> RunLog:
    """Read the last run in a log that JsonLines wrote.

    Args:
        path: A .jsonl file.

    Returns:
        Its settings and rows. What was measured twice, because the run was resumed, is there once, as measured last.

    Raises:
        FileError: The file cannot be read, is no such log, or holds no measurement.

    Example:
        >>> log = pk.monitor.JsonLines("run.jsonl")
        >>> log(pk.monitor.Row(step=0, settings={"window": 5}))
        >>> log(pk.monitor.Row(step=20, cs=0.01, ratio=0.002))
        >>> run = pk.monitor.read_run("run.jsonl")
        >>> run.settings["window"], run.rows[0].cs
        (5, 0.01)
    """
    path = Path(path)
    settings: dict[str, Any] = {}
    rows: dict[tuple[int, tuple[str, ...]], Row] = {}
    known = {f.name for f in fields(Row)} - {"record", "noted"}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read as a log of a run: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            if line.startswith("{"):  # cut off while it was written
                continue
            raise FileError(
                f"{path}: line {number} is not JSON, a log that EarlyStopping(log=…) wrote was expected"
            ) from None
        step = values.get("step") if isinstance(values, dict) else None
        if isinstance(step, bool) or not isinstance(step, int):
            raise FileError(f"{path}: line {number} has no step, a log that EarlyStopping(log=…) wrote was expected")
        if isinstance(values.get("settings"), dict):
            settings, rows = values["settings"], {}  # another run begins
            continue
        noted = {k: float(v) for k, v in values.items() if k not in RESERVED and isinstance(v, (int, float))}
        own = {k: v for k, v in values.items() if k in known and v is not None}
        for key, value in own.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise FileError(f"{path}: line {number}: {key}={value!r}, a number was expected")
        key = (step, ("cs",) if "cs" in own else tuple(sorted(noted)))
        rows.pop(key, None)
        rows[key] = Row(**cast(dict[str, Any], own), noted=noted)
    if not rows:
        raise FileError(f"{path}: there is no measurement in it")
    return RunLog(settings, sorted(rows.values(), key=lambda row: row.step))
