"""Whether `route="auto"` takes the faster of the two routes: its choice against both, measured.

    python benchmarks/routes.py [--rounds 7] [--save]

A choice counts as wrong where it takes more than 10 % longer than the other route. Beside that, what the chosen route
costs over the frozen layer.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

import peftkit as pk
from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import KINDS, Host, randomize
from peftkit.bench.rows import environment
from peftkit.bench.step import step
from peftkit.bench.timing import Call, Spread, contest, ratios
from peftkit.cli.terminal import OUT
from peftkit.wrapping.layer import adapted_modules

RESULTS = Path(__file__).parent / "results" / "routes.json"
LAYERS = (
    *(LayerShape(size, size, tokens=tokens) for size in (320, 1280) for tokens in (1, 16, 64, 512, 2048)),
    LayerShape(4096, 4096, tokens=16),
    LayerShape(10240, 1280, tokens=256),
    LayerShape(320, 768, tokens=77),
    LayerShape(320, 320, kernel=3, side=32),
    LayerShape(1280, 1280, kernel=3, side=8),
    LayerShape(1280, 1280, kernel=1, side=16),
)
#: beside those that are compared with peers, ranks at which the other route may win
RANKS = {"lora": 256, "loha": 64, "lokr": 64}


def cell(shape: LayerShape, kind: str, options: dict[str, Any], training: bool, rounds: int) -> dict[str, Any]:
    """One call, or one training step, on both routes and of the frozen layer."""
    torch.manual_seed(0)
    layer, x = shape.layer(), shape.input()
    with torch.no_grad():
        g = torch.randn_like(layer(x))
    frozen, model = Host(copy.deepcopy(layer)), Host(layer)
    pk.wrap(model, kind, **options)
    randomize(model)
    (host,) = adapted_modules(model).values()

    def on(route: str, call: Call) -> None:
        host.adapter_state.route = route
        call()

    x.requires_grad_(training)
    call, bare = (step(m, x, g) if training else torch.no_grad()(lambda m=m: m(x)) for m in (model, frozen))
    on("auto", call)
    (chosen,) = host.adapter_state.chosen.values()
    seconds = contest(
        {"frozen": bare, **{route: lambda r=route: on(r, call) for route in ("factored", "dense")}}, rounds=rounds
    )
    over_frozen = ratios(seconds, seconds.pop("frozen"))[chosen].median
    cost = {route: Spread.of(taken).median for route, taken in seconds.items()}
    other = "dense" if chosen == "factored" else "factored"
    return {
        "kind": kind,
        "options": options,
        "layer": str(shape),
        "positions": shape.positions,
        "training": training,
        "chosen": chosen,
        "over the frozen layer": round(over_frozen, 3),
        "over the other": round(ratios(seconds, seconds[other])[chosen].median, 3),
        "ms": {route: round(1e3 * value, 3) for route, value in cost.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each route")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [(kind, dict(options)) for kind, (options, _, _) in KINDS.items()]
    kinds += [(kind, {**KINDS[kind][0], "rank": rank}) for kind, rank in RANKS.items()]
    cases = [(shape, kind, options, t) for kind, options in kinds for shape in LAYERS for t in (True, False)]
    found = [cell(*case, arguments.rounds) for case in track(cases, description="measuring")]
    wrong = [row for row in found if row["over the other"] > 1.1]
    shown = Table("kind", "options", "layer", "training", "chosen", "over the other", title="wrong choices")
    for row in wrong:
        shown.add_row(
            *(str(row[name]) for name in ("kind", "options", "layer", "training", "chosen", "over the other"))
        )
    OUT.print(shown)
    long = [row for row in found if row["chosen"] == "dense" and row["training"] and row["positions"] >= 512]
    most = max((row["over the frozen layer"] for row in long), default=1)
    OUT.print(
        f"where dense is chosen for training, at 512 positions and more: at most {most:.2f} times the frozen layer"
    )
    OUT.print(f"{len(wrong)} of {len(found)} choices are more than 10 % slower than the other route")
    if arguments.save:
        summary = {"cells": len(found), "wrong": len(wrong)}
        RESULTS.write_text(json.dumps({**environment("cpu"), **summary, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
