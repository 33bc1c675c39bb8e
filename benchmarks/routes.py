"""Whether `route="auto"` takes the faster of the two routes: its choice against both, measured.

    python benchmarks/routes.py [--rounds 7] [--save]

A choice counts as wrong where it takes more than 10 % longer than the other route. Beside that, what the chosen route
costs over the frozen layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

import peftkit as pk
from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import KINDS, Host, randomize
from peftkit.bench.rows import Row
from peftkit.bench.script import Script
from peftkit.bench.step import step
from peftkit.bench.timing import Call, Spread, contest, ratios
from peftkit.wrapping.installed import adapted_modules

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


def cell(shape: LayerShape, kind: str, options: dict[str, Any], training: bool, rounds: int) -> Row:
    """Time one call, or one training step, on both routes and of the frozen layer."""
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
    (chosen,) = host.adapter_state.always.chosen.values()
    seconds = contest(
        {"frozen": bare, **{route: lambda r=route: on(r, call) for route in ("factored", "dense")}}, rounds=rounds
    )
    over_frozen = ratios(seconds, seconds.pop("frozen"))[chosen].median
    cost = {route: Spread.of(taken).median for route, taken in seconds.items()}
    other = "dense" if chosen == "factored" else "factored"
    values = {
        "options": options,
        "positions": shape.positions,
        "training": training,
        "chosen": chosen,
        "over the frozen layer": round(over_frozen, 3),
        "over the other": round(ratios(seconds, seconds[other])[chosen].median, 3),
        "ms": {route: round(1e3 * value, 3) for route, value in cost.items()},
    }
    return Row("routes", kind, str(shape), "float32", values=values)


def wrong(rows: Sequence[Row]) -> list[Row]:
    """Return the choices that take more than 10 % longer than the other route."""
    return [row for row in rows if row.values["over the other"] > 1.1]


def main() -> None:
    script = Script(__file__, __doc__, rounds=7)
    arguments = script.parse()
    kinds = [(kind, dict(options)) for kind, (options, _, _) in KINDS.items()]
    kinds += [(kind, {**KINDS[kind][0], "rank": rank}) for kind, rank in RANKS.items()]
    cases = [(shape, kind, options, t) for kind, options in kinds for shape in LAYERS for t in (True, False)]
    rows = script.runner.measure([lambda case=case: cell(*case, arguments.rounds) for case in cases])
    script.show(wrong(rows), "wrong choices")
    long = [row.values for row in rows if row.values["chosen"] == "dense" and row.values["training"]]
    most = max((row["over the frozen layer"] for row in long if row["positions"] >= 512), default=1)
    script.print(
        f"where dense is chosen for training, at 512 positions and more: at most {most:.2f} times the frozen layer"
    )
    script.print(f"{len(wrong(rows))} of {len(rows)} choices are more than 10 % slower than the other route")


if __name__ == "__main__":
    main()
