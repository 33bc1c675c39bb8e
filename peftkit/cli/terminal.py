"""What the commands print, and how."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from peftkit.errors import require_choice

if TYPE_CHECKING:
    import torch


class _Console(Console):
    """Shows names out of files as they are: no markup, and nothing that moves the cursor."""

    def render_str(self, text: str, **options: Any) -> Text:
        shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
        return super().render_str("".join(shown), **options)


OUT, ERR = (_Console(stderr=error, markup=False, highlight=False, emoji=False) for error in (False, True))

#: what reports derive from their entries, and scripts ask for
_TOTALS = ("equal", "exact", "error", "lost", "problems")

#: the dtypes by the names that options have for them
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def show(report: Any, as_json: bool, table: Table | None = None) -> None:
    """Print a report: a table and what it says of itself, or one JSON object."""
    if as_json:
        sys.stdout.write(json.dumps(_plain(report), ensure_ascii=False, indent=2) + "\n")
        return
    if table is not None and table.row_count:
        OUT.print(table)
    OUT.print(str(report), soft_wrap=True)


def _plain(value: Any) -> Any:
    """What JSON can hold of a report."""
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


def warn(message: str) -> None:
    """Say on stderr what is probably not meant."""
    ERR.print(f"warning: {message}", soft_wrap=True)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype that an option names; None where it is left out."""
    if name is None:
        return None
    require_choice("dtype", name, DTYPES)
    import torch

    return getattr(torch, DTYPES[name])


@contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while something large is read and written."""
    if quiet or not ERR.is_terminal:
        yield None
        return
    with Progress(what, BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=ERR, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
