"""`peftkit monitor …`: what a log of a run says, and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit.cli.options import Force, among
from peftkit.cli.terminal import OUT, show
from peftkit.errors import FileError

app = typer.Typer(help="Read the log of a training run: its turning point, and its picture.", no_args_is_help=True)

# As peftkit.monitor.fluctuation has them, which imports torch
MODES = ("robust", "paper", "authors")

RunFile = Annotated[Path, typer.Argument(help="A log that EarlyStopping(log='run.jsonl') wrote.", metavar="RUN.jsonl")]
Window = Annotated[int | None, typer.Option(help="See it again with windows of so many measurements.")]
Mode = Annotated[str | None, among("--mode", words=MODES, help="See it again by another rule.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def plot(
    run: RunFile,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; RUN.png by default.")] = None,
    window: Window = None,
    mode: Mode = None,
    title: Annotated[str, typer.Option(help="Above the picture.")] = "",
    force: Force = False,
) -> None:
    """Draw CS, its fluctuation, the valleys, the turning point, and losses that were noted beside them.

    Example: peftkit monitor plot run.jsonl -o run.png
    """
    from peftkit.files.formats.disk import require_output
    from peftkit.monitor.plot import draw

    path = require_output(run.with_suffix(".png") if out is None else out, [run], force)
    rows, window = _seen(run, window, mode)
    draw(rows, window, path=path, title=title or run.stem)
    OUT.print(f"wrote {path}", soft_wrap=True)


@app.command("show")
def show_(run: RunFile, window: Window = None, mode: Mode = None, as_json: Json = False) -> None:
    """Say where the turning point of a run is; exit code 1 if there is none.

    Example: peftkit monitor show run.jsonl --window 10 --mode paper
    """
    rows, window = _seen(run, window, mode)
    measured = [row for row in rows if row.cs is not None]
    found = next((row for row in measured if row.turning_point is not None), None)
    said: dict[str, Any] = {
        "measurements": len(measured),
        "steps": rows[-1].step,
        "window": window,
        "valleys": [row.valley for row in measured if row.valley is not None],
        "turning_point": None if found is None else found.turning_point,
        "detected": None if found is None else found.step,
    }
    if as_json:
        show(said, True)
    else:
        valleys = ", ".join(map(str, said["valleys"])) or "none"
        OUT.print(f"{len(measured)} measurements in {rows[-1].step} steps, windows of {window}; valleys: {valleys}")
        if found is None:
            OUT.print("no turning point")
        else:
            OUT.print(f"turning point at step {found.turning_point}, known at step {found.step}")
    raise typer.Exit(0 if found is not None else 1)


def _seen(run: Path, window: int | None, mode: str | None) -> tuple[list[Any], int]:
    """The rows of a log as they are, or as another rule sees them, and the window."""
    from peftkit.monitor.fluctuation import MODES, SecondValley
    from peftkit.monitor.logs import read_run
    from peftkit.monitor.rerun import replay

    log = read_run(run)
    logged = log.settings.get("window")
    if window is None and not isinstance(logged, int):
        raise FileError(f"{run}: the log does not say its window: give one with --window")
    size = window if window is not None else int(logged or 0)
    if window is None and mode is None:
        return log.rows, size
    if mode is None and log.settings.get("rule") in MODES:  # only the window is another
        keys = ("hysteresis", "attribution", "norm")
        own = {key: log.settings[key] for key in keys if log.settings.get(key) is not None}
        return replay(log.rows, SecondValley(size, mode=log.settings["rule"], **own)), size
    return replay(log.rows, SecondValley(size, mode=mode or "robust")), size
