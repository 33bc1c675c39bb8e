"""The command with all its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkit._version import __version__
from peftkit.cli import adapters, bench, checkpoints, kinds, monitor, reports
from peftkit.cli.options import grouped
from peftkit.cli.terminal import OUT

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "inspect": reports.inspect,
    "doctor": reports.doctor,
    "diff": reports.diff,
    "plan": reports.plan,
    "merge": checkpoints.merge,
    "extract": checkpoints.extract,
    "export": adapters.export,
    "convert": adapters.convert,
    "resize": adapters.resize,
    "rescale": adapters.rescale,
    "combine": adapters.combine,
    "kinds": kinds.kinds,
}
for name, command in COMMANDS.items():
    # a factor of rescale may be negative, and is no option then
    app.command(name, context_settings={"ignore_unknown_options": name == "rescale"})(grouped(command))
app.add_typer(monitor.app, name="monitor")
app.add_typer(bench.app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        OUT.print(f"peftkit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Look into adapter files, merge them, and turn them into what other programs read.

    Exit codes: 0 done; 1 files differ, or are usable in part; 2 bad input or usage, and nothing was written; 130 ended
    by Ctrl-C; 143 ended by a request to stop.

    Example: peftkit merge sd15.safetensors style.safetensors=0.8 -o merged.safetensors
    """
    del version
