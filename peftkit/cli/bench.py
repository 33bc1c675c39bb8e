"""`peftkit bench …`: what adapter operations cost here, and how two runs compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from peftkit.bench import models, ops, report, rows, step
from peftkit.bench.cases import MODELS, LayerShape
from peftkit.bench.peers import KINDS, missing
from peftkit.bench.rows import Row
from peftkit.bench.runner import Runner
from peftkit.cli.terminal import DTYPES, OUT
from peftkit.errors import BenchError, OptionError

app = typer.Typer(
    help="What adapter operations cost here: ratios to a reference that is timed in the same rounds.",
    no_args_is_help=True,
)

_KINDS, _OPERATIONS = ",".join(KINDS), ",".join(ops.OPERATIONS)

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Peers = Annotated[str, typer.Option(help="Compare with these, of lycoris,peft; they must be installed.")]
Kinds = Annotated[str, typer.Option(help=f"Of {','.join(KINDS)}.")]
Dtypes = Annotated[str, typer.Option("--dtype", help=f"Of {','.join(DTYPES)}.")]
Shapes = Annotated[
    str,
    typer.Option(help=f"A model, {', '.join(MODELS)}; or own layers: OUTxIN@TOKENS, OUTxINkKERNEL@SIDE, by commas."),
]
Rounds = Annotated[int, typer.Option(min=1, help="How often everything takes its turn.")]
Threads = Annotated[int, typer.Option(min=1, help="Of torch on the CPU; with more, other programs disturb more.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write what was measured to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw it into this file. Needs matplotlib.")]


@app.command("step")
def step_(
    device: Device = "cpu",
    peers: Peers = "",
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp32",
    shapes: Shapes = "sd15",
    rounds: Rounds = 11,
    threads: Threads = 1,
    json: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Time forward and backward of one adapted layer, over the same layer frozen.

    MB: what autograd keeps beyond the layer's input.

    Example: peftkit bench step --shapes 1280x1280@512 --peers lycoris,peft
    """
    run = _Run("step", device, peers, kinds, dtypes, shapes, threads)
    run.measure(
        [
            lambda s=shape, k=kind, d=dtype: step.measure(s, k, d, device=device, peers=run.peers, rounds=rounds)
            for kind in run.kinds
            for dtype in run.dtypes
            for shape in run.shapes
        ],
        json,
        plot,
    )


@app.command("ops")
def ops_(
    device: Device = "cpu",
    peers: Peers = "",
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp32",
    shapes: Shapes = "sd15",
    operations: Annotated[str, typer.Option(help=f"Of {','.join(ops.OPERATIONS)}.")] = _OPERATIONS,
    rounds: Rounds = 11,
    threads: Threads = 1,
    json: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Time building ΔW (dense), adding it to W (add), measuring CS (watch) and making the adapter (make), over a floor.

    The floor is writing a weight into fresh memory and multiplying as fast as a large product does. MB: the most that
    is held beyond the start.

    Example: peftkit bench ops --operations dense,add --shapes llama --dtype bf16
    """
    run = _Run("ops", device, peers, kinds, dtypes, shapes, threads)
    chosen = _chosen("--operations", operations, ops.OPERATIONS)
    run.measure(
        [
            lambda o=operation, s=shape, k=kind, d=dtype: ops.measure(
                o, s, k, d, device=device, peers=run.peers, rounds=rounds
            )
            for operation in chosen
            for kind in run.kinds
            for dtype in run.dtypes
            for shape in run.shapes
        ],
        json,
        plot,
    )


@app.command("merge")
def merge_(
    device: Device = "cpu",
    peers: Peers = "",
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp32",
    shapes: Shapes = "sd15",
    rounds: Rounds = 5,
    threads: Threads = 1,
    json: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Time merging for good into a model of these layers, over reading and writing every weight once.

    Example: peftkit bench merge --shapes sd15-unet --peers lycoris,peft --dtype fp16
    """
    run = _Run("merge", device, peers, kinds, dtypes, shapes, threads)
    run.measure(
        [
            lambda k=kind, d=dtype: models.merge(
                run.shapes, run.case, k, d, device=device, peers=run.peers, rounds=rounds
            )
            for kind in run.kinds
            for dtype in run.dtypes
        ],
        json,
        plot,
    )


@app.command("monitor")
def monitor_(
    device: Device = "cpu",
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp32",
    shapes: Shapes = "sd15",
    rounds: Rounds = 11,
    threads: Threads = 1,
    json: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Time measuring CS once over these layers, over one training step of each: divide by the steps in between.

    Example: peftkit bench monitor --shapes vit
    """
    run = _Run("monitor", device, "", kinds, dtypes, shapes, threads)
    run.measure(
        [
            lambda k=kind, d=dtype: models.monitor(run.shapes, run.case, k, d, device=device, rounds=rounds)
            for kind in run.kinds
            for dtype in run.dtypes
        ],
        json,
        plot,
    )


@app.command("checkpoint")
def checkpoint_(
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp16",
    shapes: Shapes = "sd15",
    rounds: Rounds = 5,
    threads: Threads = 1,
    json: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Time merging an adapter file into a checkpoint file of these layers, over copying that file.

    Example: peftkit bench checkpoint --shapes sd15-unet --kinds lora
    """
    run = _Run("checkpoint", "cpu", "", kinds, dtypes, shapes, threads)
    run.measure(
        [
            lambda k=kind, d=dtype: models.checkpoint(run.shapes, run.case, k, d, rounds=rounds)
            for kind in run.kinds
            for dtype in run.dtypes
        ],
        json,
        plot,
    )


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="What --json wrote.")],
    after: Annotated[Path, typer.Argument(help="The same later, or elsewhere.")],
) -> None:
    """Put two runs side by side: ours over the reference in each, and how that changed; ~ where it is within the noise.

    Example: peftkit bench compare before.json after.json
    """
    for table in report.compared(rows.read(before), rows.read(after)):
        OUT.print(table)


class _Run:
    """The choices of a command, checked."""

    def __init__(
        self, benchmark: str, device: str, peers: str, kinds: str, dtypes: str, shapes: str, threads: int
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise OptionError(f"--device {device}: cpu or cuda was expected")
        if device == "cuda" and not torch.cuda.is_available():
            raise BenchError("--device cuda was asked for, and torch finds no GPU here: use --device cpu")
        torch.set_num_threads(threads)
        self.benchmark, self.device = benchmark, device
        self.peers = _chosen("--peers", peers, ("lycoris", "peft"))
        lacking = missing(self.peers)
        if lacking:
            raise BenchError(f"--peers {','.join(lacking)}: not installed here; pip install lycoris-lora peft")
        self.kinds = _chosen("--kinds", kinds, tuple(KINDS))
        self.dtypes = [DTYPES[name] for name in _chosen("--dtype", dtypes, tuple(DTYPES))]
        self.case, self.shapes = shapes, _layers(shapes)

    def measure(self, cells: Sequence[Callable[[], Row]], json: Path | None, plot: Path | None) -> None:
        """Measure cell by cell, show the rows, and draw them."""
        found = Runner(self.benchmark, self.device, json).measure(cells)
        for question in dict.fromkeys(row.question for row in found):
            OUT.print(report.table([row for row in found if row.question == question], question))
        if json is not None:
            OUT.print(f"wrote {json}", soft_wrap=True)
        if plot is not None:
            report.draw(found, plot)
            OUT.print(f"wrote {plot}", soft_wrap=True)


def _chosen(option: str, given: str, known: Sequence[str]) -> list[str]:
    names = [name for name in given.split(",") if name]
    strange = [name for name in names if name not in known]
    if strange:
        raise OptionError(f"{option} {strange[0]}: one or more of {', '.join(known)} were expected")
    return list(dict.fromkeys(names))


def _layers(shapes: str) -> Sequence[LayerShape]:
    return MODELS[shapes]() if shapes in MODELS else [LayerShape.parse(text) for text in shapes.split(",")]
