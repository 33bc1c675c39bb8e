"""What the commands share: how reports are shown, and what is typed is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from peftkit.errors import OptionError
from peftkit.files.formats import strict_json
from peftkit.files.merge_plan import MergePlan
from peftkit.files.read import Reading


class _Console(Console):
    """Shows names out of files as they are: no markup, and nothing that moves the cursor."""

    def render_str(self, text: str, **options: Any) -> Text:
        shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
        return super().render_str("".join(shown), **options)


OUT, ERR = (_Console(stderr=error, markup=False, highlight=False, emoji=False) for error in (False, True))

#: what reports derive from their entries, and scripts ask for
_TOTALS = ("equal", "exact", "error", "lost", "problems")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write(make: Callable[[Path], Any], out: Path, dry_run: bool, as_json: bool) -> None:
    """Make a file and show the report; for a dry run make it where nobody keeps it."""
    if not dry_run:
        report = make(out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = dataclasses.replace(make(Path(folder) / out.name), path=out)
    show(report, as_json, report.table())
    if dry_run and not as_json:
        OUT.print("dry run: nothing was written")


def show(report: Any, as_json: bool, table: Table | None = None) -> None:
    """Print a report as JSON, or as a table for people."""
    if as_json:
        sys.stdout.write(json.dumps(_plain(report), ensure_ascii=False, indent=2) + "\n")
        return
    if table is not None and table.row_count:
        OUT.print(table)
    OUT.print(str(report), soft_wrap=True)


def _plain(value: Any) -> Any:
    """What JSON can hold of a report."""
    if isinstance(value, MergePlan):
        return {"patches": _plain(value.patches), "vectors": _plain(value.vectors), "touched": list(value.touched)}
    if dataclasses.is_dataclass(value):
        totals = [name for name in _TOTALS if isinstance(getattr(type(value), name, None), property)]
        names = [field.name for field in dataclasses.fields(value)] + totals
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def reading(dora_axis: str | None, alpha_zero: str | None, ignore: list[str] | None, allow_pickle: bool) -> Reading:
    """Return the reading options of a command as the verbs on files take them."""
    return {"dora_axis": dora_axis, "alpha_zero": alpha_zero, "ignore": ignore or (), "allow_pickle": allow_pickle}


def strengths(adapters: list[str]) -> dict[str, float | dict[str, float]]:
    """FILE, FILE=STRENGTH or FILE=RULES.json -> {file: strength}."""
    found: dict[str, float | dict[str, float]] = {}
    for text in adapters:
        file, strength = _split(text)
        if file in found:
            raise OptionError(f"{file} was given twice: give it once, with the sum of its strengths")
        found[file] = _rules(Path(strength)) if strength.endswith(".json") else number(strength)
    return found


def _split(text: str) -> tuple[str, str]:
    """A file and its strength. Both may have "=" in them: the longest file that is there counts."""
    cuts = [len(text), *(i for i in range(len(text) - 1, 0, -1) if text[i] == "=")]
    found = next((cut for cut in cuts if os.path.exists(text[:cut])), None)
    if found is None:
        file, _, strength = text.rpartition("=")
        return (file, strength) if file and re.fullmatch(r"[-+.\deE]+|.*\.json", strength) else (text, "1")
    return text[:found], text[found + 1 :] or "1"


def _rules(path: Path) -> dict[str, float]:
    rules = strict_json.read_json(path)
    if not isinstance(rules, dict):
        raise OptionError(f"{path} holds a {type(rules).__name__}, strengths by pattern were expected")
    return rules


def number(text: str) -> float:
    """Return the number that a text names, else raise OptionError."""
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"{text!r} was given, a number was expected") from None


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype that --dtype names, None without it."""
    if name is not None and name not in DTYPES:
        raise OptionError(f"dtype {name!r} was given, one of {', '.join(DTYPES)} was expected")
    return None if name is None else DTYPES[name]


@contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while something large is read and written."""
    if quiet or not ERR.is_terminal:
        yield None
        return
    with Progress(what, BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=ERR, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
