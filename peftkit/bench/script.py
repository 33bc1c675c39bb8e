"""The command line that the scripts in benchmarks/ share: --json FILE, --save, and what a script adds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from peftkit.bench.report import figures, table
from peftkit.bench.rows import Row
from peftkit.bench.runner import Cell, Runner

#: as many columns as the command line's reports, where output is no terminal
_OUT = Console(markup=False, highlight=False, emoji=False)


class Script:
    """One script: its options, its runner, and its report.

    Example:
        script = Script(__file__, __doc__, rounds=7)
        arguments = script.parse()
        script.run([lambda: measure(kind, arguments.rounds) for kind in KINDS])
    """

    def __init__(self, file: str, document: str | None, *, rounds: int = 0, kinds: Sequence[str] = ()) -> None:
        """Name the script by its file and describe it by its docstring.

        Args:
            file: `__file__`; results go to results/<name>.json beside it.
            document: `__doc__`.
            rounds: the default of --rounds; 0 for a script without rounds.
            kinds: the adapters --kinds takes, all by default; none for a script without that option.
        """
        path = Path(file).resolve()
        self.name, self.results = path.stem, path.parent / "results" / f"{path.stem}.json"
        self.parser = argparse.ArgumentParser(
            description=document, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._kinds = kinds
        if rounds:
            self.parser.add_argument("--rounds", type=int, default=rounds, help="how often everything takes its turn")
        if kinds:
            self.parser.add_argument("--kinds", default=",".join(kinds), help=f"of {','.join(kinds)}")
        self.parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
        self.parser.add_argument("--json", type=Path, metavar="FILE", help="write the results into this file")
        self.parser.add_argument("--save", action="store_true", help=f"write them into results/{self.name}.json")
        self.runner = Runner(self.name)

    def parse(self) -> argparse.Namespace:
        """Return the arguments of this process; torch takes its number of threads from them."""
        arguments = self.parser.parse_args()
        if self._kinds:
            arguments.kinds = [kind for kind in arguments.kinds.split(",") if kind]
            unknown = [kind for kind in arguments.kinds if kind not in self._kinds]
            if unknown:
                self.parser.error(f"--kinds {unknown[0]}: one or more of {', '.join(self._kinds)} were expected")
        self.runner.path = self.results if arguments.save else arguments.json
        torch.set_num_threads(arguments.threads)
        return arguments

    def run(self, cells: Sequence[Cell]) -> list[Row]:
        """Take the measurements, show their rows, and return them.

        Args:
            cells: calls that return a row, or several.
        """
        rows = self.runner.measure(cells)
        for question in dict.fromkeys(row.question for row in rows):
            self.show([row for row in rows if row.question == question], question)
        if self.runner.path is not None:
            self.print(f"wrote {self.runner.path}")
        return rows

    def show(self, rows: Sequence[Row], title: str) -> None:
        """Print ratios and values of rows as tables.

        Args:
            rows: rows of one question.
            title: put above the tables.
        """
        compared, valued = ([row for row in rows if getattr(row, name)] for name in ("ratio", "values"))
        if compared:
            _OUT.print(table(compared, title))
        if valued:
            _OUT.print(figures(valued, title))

    def print(self, *shown: Any) -> None:
        """Print a line or a table."""
        _OUT.print(*shown, soft_wrap=all(isinstance(each, str) for each in shown))
