"""Cost against size, one axis at a time: output width m, input width n, rank, tokens, layers; and the slope expected.

    python benchmarks/curves.py [--save]
    python benchmarks/curves.py --draw                 # the picture again, from what was saved

Slopes are those of a straight line through the last points in log–log: 1 is a cost in proportion. What is not in
proportion is expected to be below: a call costs some microseconds whatever it does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import peftkit as pk
from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import KINDS, randomize
from peftkit.bench.rows import Row, read
from peftkit.bench.script import Script
from peftkit.bench.timing import contest
from peftkit.monitor.style import GREY, MARKERS, PALETTE, WIDTH, legend_below, save, styled, ticks_at
from peftkit.wrapping.installed import installed_adapters

PICTURE = Path(__file__).parents[1] / "docs" / "curves.png"

#: axis -> its sizes
AXES: dict[str, Sequence[int]] = {
    "m": (256, 512, 1024, 2048, 4096),
    "n": (256, 512, 1024, 2048, 4096),
    "rank": (8, 16, 32, 64, 128),
    "tokens": (128, 256, 512, 1024, 2048),
    "layers": (4, 8, 16, 32, 64),
}
TITLES = {"m": "output width m", "n": "input width n", "rank": "rank", "tokens": "tokens", "layers": "layers"}
OPERATIONS = {"apply": "ΔW·x, ms", "merge": "merge, ms"}
#: milliseconds that are labelled
DECADES = {"apply": (0.1, 1, 10, 100), "merge": (1, 10, 100)}
#: the option that is a kind's rank
RANKED = {"lora": "rank", "loha": "rank", "dora": "rank", "oft": "block_size"}

#: (operation, axis) -> the largest exponent that the algebra allows
EXPECTED: dict[tuple[str, str], float] = {
    ("apply", "m"): 1,
    ("apply", "n"): 1,
    ("apply", "rank"): 1,
    ("apply", "tokens"): 1,
    ("apply", "layers"): 1,
    ("merge", "m"): 1,
    ("merge", "n"): 1,
    ("merge", "rank"): 1,
    ("merge", "layers"): 1,
}
#: LoHa of rank r is applied as the LoRA of rank r² that it is
HIGHER = {("loha", "apply", "rank"): 2}
#: what caches and noise may add to an exponent
SLACK = 0.25


def cost(kind: str, operation: str, axis: str, size: int) -> float:
    """Milliseconds of ΔW·x of every layer, without the frozen layers' products, or of merging for good."""
    sizes = {"m": 1024, "n": 1024, "tokens": 512, "layers": 1, axis: size}
    options = dict(KINDS[kind][0])
    if axis == "rank":
        options[RANKED[kind]] = size if kind != "loha" else size // 4
    shape = LayerShape(sizes["m"], sizes["n"], tokens=sizes["tokens"])
    model = nn.ModuleList(shape.layer() for _ in range(sizes["layers"]))

    def wrap() -> None:
        pk.wrap(model, kind, route="factored", **options)
        randomize(model)

    if operation == "merge":
        seconds = contest({"merge": lambda: pk.merge(model, backup=None)}, rounds=5, prepare={"merge": wrap})
        return 1e3 * statistics.median(seconds["merge"])
    wrap()
    x = shape.input()
    here = list(installed_adapters(model))
    outputs = [nn.functional.linear(x, each.base) for each in here]  # which DoRA rescales

    @torch.no_grad()
    def apply() -> None:
        for each, wx in zip(here, outputs, strict=True):
            each.adapter(each.base, 1.0).apply(x, wx, each.slot.geometry)

    return 1e3 * statistics.median(contest({"apply": apply}, rounds=7)["apply"])


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of the last three points."""
    points = [(math.log(s), math.log(max(v, 1e-6))) for s, v in list(zip(sizes, values, strict=True))[-3:]]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


@styled()
def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for every operation and axis, a curve for every kind, and a cost in proportion to compare with."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharey="row", sharex="col")
    for line, (operation, label) in zip(grid, OPERATIONS.items(), strict=True):
        for own, (axis, sizes) in zip(line, AXES.items(), strict=True):
            cell = [row for row in rows if (row.question, row.case) == (operation, axis)]
            if not cell:
                own.set_axis_off()
                continue
            own.set(xscale="log", yscale="log")
            for row in cell:
                i = list(KINDS).index(row.kind)
                own.plot(sizes, row.values["ms"], color=PALETTE[i], marker=MARKERS[i], lw=1.3, label=row.kind)
            start = statistics.median(row.values["ms"][0] for row in cell)
            proportional = [start * size / sizes[0] for size in sizes]
            own.plot(sizes, proportional, color=GREY, marker="", ls="--", lw=1.1, label="in proportion")
            ticks_at(own.xaxis, sizes[::2])
            ticks_at(own.yaxis, DECADES[operation])
            own.tick_params(labelbottom=True)
        line[0].set_ylabel(label)
    for own, title in zip(grid[0], TITLES.values(), strict=True):
        own.set_title(title)
    legend_below(figure, columns=len(KINDS) + 1)
    save(figure, path)


def measure(kind: str, operation: str, axis: str) -> Row:
    """Measure every size of an axis; `expected` is the largest slope that the algebra allows."""
    found = [cost(kind, operation, axis, size) for size in AXES[axis]]
    values = {
        "sizes": list(AXES[axis]),
        "ms": [float(f"{v:.3g}") for v in found],
        "slope": round(slope(AXES[axis], found), 2),
        "expected": HIGHER.get((kind, operation, axis), EXPECTED[operation, axis]),
    }
    return Row(operation, kind, axis, "float32", values=values)


def main() -> None:
    script = Script(__file__, __doc__)
    script.parser.add_argument("--draw", action="store_true", help="draw the saved result and measure nothing")
    arguments = script.parse()
    if arguments.draw:
        draw(read(script.results), PICTURE)
        return
    cells = [(k, o, a) for (o, a) in EXPECTED for k in KINDS if a != "rank" or k in RANKED]
    rows = script.run([lambda cell=cell: measure(*cell) for cell in cells])
    if arguments.save:
        draw(rows, PICTURE)
    steep = [
        "{}, {} over {}: {slope:.2f} where {expected} was expected".format(
            row.kind, row.question, row.case, **row.values
        )
        for row in rows
        if row.values["slope"] > row.values["expected"] + SLACK
    ]
    if steep:
        raise SystemExit("\n".join(steep))


if __name__ == "__main__":
    main()
