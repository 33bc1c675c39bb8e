"""The command that lists the kinds of adapters."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Table

from peftkit.cli.options import Json
from peftkit.cli.terminal import OUT, show
from peftkit.errors import OptionError

Shape = Annotated[str, typer.Option(help="Outputs × inputs of the Linear that parameters are counted for.")]


def kinds(shape: Shape = "768x768", as_json: Json = False) -> None:
    """List every kind of adapter: its family, its formula, and how many numbers it trains on a Linear.

    Options have their defaults; the JSON has them too, with papers and the names in PEFT and LyCORIS.

    Example: peftkit kinds --shape 1280x320
    """
    from peftkit.adapters import registry
    from peftkit.adapters.describe import describe

    sizes = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", shape)
    if sizes is None:
        raise OptionError(f"--shape {shape} was given, two sizes as in 1280x320 were expected")
    found, refused = [], []
    for kind in registry.kinds():
        try:
            found.append(describe(kind, int(sizes[1]), int(sizes[2])))
        except OptionError as error:
            refused.append(str(error))
    if as_json:
        show({"kinds": found, "refused": refused}, as_json)
        return
    table = Table("adapter", "family", "ΔW", "parameters")
    for one in found:
        table.add_row(", ".join((one.kind, *one.aliases)), one.facts.family, one.facts.formula, f"{one.parameters:,}")
    OUT.print(table)
    for reason in refused:
        OUT.print(f"not on {shape}: {reason}", soft_wrap=True)
