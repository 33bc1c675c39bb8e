"""Measurements taken one by one, their rows written into a file after each."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from peftkit.bench.rows import Row, dump

#: a measurement, ready to be taken
Cell = Callable[[], "Row | Sequence[Row]"]


@dataclass
class Runner:
    """Takes measurements and keeps their rows.

    Attributes:
        benchmark: the name of what is measured, such as "step".
        device: "cpu" or "cuda".
        path: the results file, or None to write none.
        rows: what was measured so far.
    """

    benchmark: str
    device: str = "cpu"
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)

    def measure(self, cells: Sequence[Cell]) -> list[Row]:
        """Take the measurements and return their rows.

        The file is written after each measurement, so that an interrupted run has what it has.

        Args:
            cells: calls that return a row, or several.
        """
        prepare(self.device)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peers, about how they are used
            for cell in track(cells, description="measuring", console=Console(stderr=True), transient=True):
                found = cell()
                self.rows += [found] if isinstance(found, Row) else found
                self.write()
        return self.rows

    def write(self) -> None:
        """Write the rows into the file, which is replaced as a whole."""
        if self.path is None:
            return
        text = dump(self.rows, benchmark=self.benchmark, device=self.device, command=command())
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(text)
        os.replace(part, self.path)


def prepare(device: str) -> None:
    """Seed, keep peers from talking, and let a GPU's convolutions compute in the dtype they are given."""
    torch.manual_seed(0)
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    if device != "cpu":
        # cuDNN rounds fp32 to 10 bits by default, which no adapter could be told from an error by
        torch.backends.cudnn.allow_tf32 = False


def command() -> str:
    """Return the command line of this process, as a shell takes it."""
    program = Path(sys.argv[0])
    if program.suffix == ".py" and program.name != "__main__.py":
        here = program.resolve()
        shown = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
        return shlex.join(["python", str(shown), *sys.argv[1:]])
    return shlex.join(["peftkit", *sys.argv[1:]])
