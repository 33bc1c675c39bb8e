"""`peftkit bench …`: what adapter operations cost here, and how two runs compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftkit.cli.options import Force, among, completion, grouped
from peftkit.cli.terminal import DTYPES, OUT, dtype_of
from peftkit.errors import BenchError, OptionError, require_choice

if TYPE_CHECKING:
    from peftkit.bench.cases import LayerShape
    from peftkit.bench.rows import Row

app = typer.Typer(
    help="Measure what adapter operations cost here: ratios to a reference that is timed in the same rounds.",
    no_args_is_help=True,
)

# Values of options, as peftkit.bench has them, which imports torch: help and completion do without
KINDS = ("lora", "loha", "lokr", "dora", "oft", "loldu")
OPERATIONS = ("dense", "add", "watch", "make")
MODELS = ("sd15", "sdxl", "flux", "llama", "vit", "square", "sd15-unet")
PEERS = ("lycoris", "peft")

_KINDS, _OPERATIONS = ",".join(KINDS), ",".join(OPERATIONS)

Device = Annotated[str, among("--device", words=("cpu", "cuda"), help="Where to measure.")]
Peers = Annotated[str, among("--peers", words=PEERS, help="Compare with these, which must be installed.")]
Kinds = Annotated[str, among("--kinds", words=KINDS, help="Which adapters, by commas.")]
Dtypes = Annotated[str, among("--dtype", words=tuple(DTYPES), help="In which dtypes, by commas.")]
Shapes = Annotated[
    str,
    typer.Option(
        help=f"A model, {', '.join(MODELS)}; or own layers: OUTxIN@TOKENS, OUTxINkKERNEL@SIDE, by commas.",
        autocompletion=completion(MODELS),
    ),
]
Operations = Annotated[str, among("--operations", words=OPERATIONS, help="Which operations, by commas.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often everything takes its turn.")]
Threads = Annotated[int, typer.Option(min=1, help="Of torch on the CPU; with more, other programs disturb more.")]


@dataclass(frozen=True)
class ResultOptions:
    """Where results go beside the terminal."""

    json: Annotated[Path | None, typer.Option("--json", help="Write what was measured to this file.")] = None
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file. Needs matplotlib.")] = None
    force: Force = False

    def checked(self) -> ResultOptions:
        """The same, where both files may be written; the folder of the JSON file is made."""
        from peftkit.files.formats.disk import require_output

        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.json, self.plot):
            if path is not None:
                require_output(path, overwrite=self.force)
        return self


@app.command("step")
@grouped
def step_(
    results: ResultOptions,
    device: Device = "cpu",
    peers: Peers = "",
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp32",
    shapes: Shapes = "sd15",
    rounds: Rounds = 11,
    threads: Threads = 1,
) -> None:
    """Time forward and backward of one adapted layer, over the same layer frozen.

    MB: what autograd keeps beyond the layer's input.

    Example: peftkit bench step --shapes 1280x1280@512 --peers lycoris,peft
    """
    from peftkit.bench import step

    run = _Run("step", device, peers, kinds, dtypes, shapes, threads, results)
    run.measure(
        [
            lambda s=shape, k=kind, d=dtype: step.measure(s, k, d, device=device, peers=run.peers, rounds=rounds)
            for kind in run.kinds
            for dtype in run.dtypes
            for shape in run.shapes
        ]
    )


@app.command("ops")
@grouped
def ops_(
    results: ResultOptions,
    device: Device = "cpu",
    peers: Peers = "",
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp32",
    shapes: Shapes = "sd15",
    operations: Operations = _OPERATIONS,
    rounds: Rounds = 11,
    threads: Threads = 1,
) -> None:
    """Time building ΔW (dense), adding it to W (add), measuring CS (watch) and making the adapter (make), over a floor.

    The floor is writing a weight into fresh memory and multiplying as fast as a large product does. MB: the most that
    is held beyond the start.

    Example: peftkit bench ops --operations dense,add --shapes llama --dtype bf16
    """
    from peftkit.bench import ops

    run = _Run("ops", device, peers, kinds, dtypes, shapes, threads, results)
    chosen = _chosen("--operations", operations, OPERATIONS)
    run.measure(
        [
            lambda o=operation, s=shape, k=kind, d=dtype: ops.measure(
                o, s, k, d, device=device, peers=run.peers, rounds=rounds
            )
            for operation in chosen
            for kind in run.kinds
            for dtype in run.dtypes
            for shape in run.shapes
        ]
    )


@app.command("merge")
@grouped
def merge_(
    results: ResultOptions,
    device: Device = "cpu",
    peers: Peers = "",
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp32",
    shapes: Shapes = "sd15",
    rounds: Rounds = 5,
    threads: Threads = 1,
) -> None:
    """Time merging for good into a model of these layers, over reading and writing every weight once.

    Example: peftkit bench merge --shapes sd15-unet --peers lycoris,peft --dtype fp16
    """
    from peftkit.bench import models

    run = _Run("merge", device, peers, kinds, dtypes, shapes, threads, results)
    run.measure(
        [
            lambda k=kind, d=dtype: models.merge(
                run.shapes, run.case, k, d, device=device, peers=run.peers, rounds=rounds
            )
            for kind in run.kinds
            for dtype in run.dtypes
        ]
    )


@app.command("monitor")
@grouped
def monitor_(
    results: ResultOptions,
    device: Device = "cpu",
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp32",
    shapes: Shapes = "sd15",
    rounds: Rounds = 11,
    threads: Threads = 1,
) -> None:
    """Time measuring CS once over these layers, over one training step of each: divide by the steps in between.

    Example: peftkit bench monitor --shapes vit
    """
    from peftkit.bench import models

    run = _Run("monitor", device, "", kinds, dtypes, shapes, threads, results)
    run.measure(
        [
            lambda k=kind, d=dtype: models.monitor(run.shapes, run.case, k, d, device=device, rounds=rounds)
            for kind in run.kinds
            for dtype in run.dtypes
        ]
    )


@app.command("checkpoint")
@grouped
def checkpoint_(
    results: ResultOptions,
    kinds: Kinds = _KINDS,
    dtypes: Dtypes = "fp16",
    shapes: Shapes = "sd15",
    rounds: Rounds = 5,
    threads: Threads = 1,
) -> None:
    """Time merging an adapter file into a checkpoint file of these layers, over copying that file.

    Example: peftkit bench checkpoint --shapes sd15-unet --kinds lora
    """
    from peftkit.bench import models

    run = _Run("checkpoint", "cpu", "", kinds, dtypes, shapes, threads, results)
    run.measure(
        [
            lambda k=kind, d=dtype: models.checkpoint(run.shapes, run.case, k, d, rounds=rounds)
            for kind in run.kinds
            for dtype in run.dtypes
        ]
    )


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="What --json wrote.")],
    after: Annotated[Path, typer.Argument(help="The same later, or elsewhere.")],
) -> None:
    """Compare two runs: ours over the reference in each, and how that changed; ~ where it is within the noise.

    Example: peftkit bench compare before.json after.json
    """
    from peftkit.bench import report, rows

    for table in report.compared(rows.read(before), rows.read(after)):
        OUT.print(table)


class _Run:
    """The choices of a command, checked."""

    def __init__(
        self,
        benchmark: str,
        device: str,
        peers: str,
        kinds: str,
        dtypes: str,
        shapes: str,
        threads: int,
        results: ResultOptions,
    ) -> None:
        import torch

        from peftkit.bench.peers import missing

        require_choice("--device", device, ("cpu", "cuda"))
        if device == "cuda" and not torch.cuda.is_available():
            raise BenchError("--device cuda was asked for, and torch finds no GPU here: use --device cpu")
        torch.set_num_threads(threads)
        self.benchmark, self.device = benchmark, device
        self.peers = _chosen("--peers", peers, PEERS)
        lacking = missing(self.peers)
        if lacking:
            raise BenchError(f"--peers {','.join(lacking)}: not installed here; pip install lycoris-lora peft")
        self.kinds = _chosen("--kinds", kinds, KINDS)
        self.dtypes = [dtype for name in _chosen("--dtype", dtypes, tuple(DTYPES)) if (dtype := dtype_of(name))]
        self.case, self.shapes = shapes, _layers(shapes)
        self.results = results.checked()

    def measure(self, cells: Sequence[Callable[[], Row]]) -> None:
        """Measure cell by cell, show the rows, and draw them."""
        from peftkit.bench import report
        from peftkit.bench.runner import Runner

        json, plot = self.results.json, self.results.plot
        found = Runner(self.benchmark, self.device, json).measure(cells)
        for question in dict.fromkeys(row.question for row in found):
            OUT.print(report.table([row for row in found if row.question == question], question))
        if plot is not None:
            report.draw(found, plot)
        for path in (json, plot):
            if path is not None:
                OUT.print(f"wrote {path}", soft_wrap=True)


def _chosen(option: str, given: str, known: Sequence[str]) -> list[str]:
    names = [name for name in given.split(",") if name]
    strange = [name for name in names if name not in known]
    if strange:
        raise OptionError(f"{option} {strange[0]}: one or more of {', '.join(known)} were expected")
    return list(dict.fromkeys(names))


def _layers(shapes: str) -> Sequence[LayerShape]:
    from peftkit.bench import cases

    if shapes in cases.MODELS:
        return cases.MODELS[shapes]()
    return [cases.LayerShape.parse(text) for text in shapes.split(",")]
