"""Everything a GPU is needed for, in at most ten minutes: the kernels' tests, operators, steps, merges, whole networks.

    make gpu        or        python benchmarks/gpu.py [--parts tests,operators,…] [--json FILE]

On a GPU the rows go to benchmarks/results/<name of the GPU>.json. Each part has a process and a time limit of its own:
a part that reaches its limit keeps what it has, and after a measurement that ends its process the part goes on with the
next one. At the end stands what failed or was cut; the exit status is 1 if anything failed.

Without a GPU the same parts run on the CPU with tiny shapes, which tries this script and measures nothing: no file is
written unless --json asks for one, and what is left out is said.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import peftkit as pk
from peftkit.bench import model_step, models, operators, step
from peftkit.bench.cases import MODELS, LayerShape
from peftkit.bench.networks import decoder, unet
from peftkit.bench.peers import KINDS, Host, adapted, missing
from peftkit.bench.rows import Row, read
from peftkit.bench.runner import Cell
from peftkit.bench.script import Script

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
PEERS = [name for name in ("lycoris", "peft") if name not in missing(["lycoris", "peft"])]
#: on the CPU one kind with peers is enough to try the script
TRIED = tuple(KINDS) if GPU else ("lora",)
ROUNDS = 7 if GPU else 1
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def tests() -> Iterator[Cell]:
    """Correctness against float64, opcheck, gradients, repeatability, merging: tests/kernels/test_device.py."""

    def run() -> Row:
        file = "tests/kernels/test_device.py"
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            options = ["-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
            subprocess.run([sys.executable, "-m", "pytest", *options, file], cwd=ROOT, check=False, stdout=sys.stderr)
            cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        failed = [
            f"{case.get('name')}: {found.get('message', '')[:200]}"
            for case in cases
            for found in case.findall("failure") + case.findall("error")
        ]
        skipped = sum(case.find("skipped") is not None for case in cases)
        values = {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}
        return Row("tests", "kernels", file, values=values)

    yield run


def operator_cells() -> Iterator[Cell]:
    """Each operator: kernel, reference, eager, torch.compile and lycoris' kernel; errors, memory, repeatability."""
    sizes = {
        BF16: [(1024, 1024, 16), (4096, 4096, 32), (4096, 4096, 128), (11008, 4096, 16)],
        FP16: [(4096, 4096, 32)],
        FP32: [(4096, 4096, 32)],
    }
    for dtype, own in (sizes if GPU else {FP32: [(48, 64, 4)], BF16: [(48, 64, 4)]}).items():
        for size in own:
            for operator in operators.OPERATORS:
                yield lambda o=operator, s=size, d=dtype: operators.measure(
                    o, s, d, device=DEVICE, rounds=30 if GPU else 1
                )


def steps() -> Iterator[Cell]:
    """A training step of one layer, ours and the peers', over the frozen layer."""
    texts = ("1280x1280@4096", "4096x4096@2048", "320x320@64", "640x640k3@32") if GPU else ("64x64@8", "32x32k3@6")
    for dtype in (BF16, FP32, FP16) if GPU else (FP32,):
        for shape in map(LayerShape.parse, texts):
            for kind in TRIED:
                yield lambda s=shape, k=kind, d=dtype: step.measure(s, k, d, device=DEVICE, peers=PEERS, rounds=ROUNDS)


def merges() -> Iterator[Cell]:
    """Merging for good into a model's weights, ours and the peers'."""
    case = "sd15-unet" if GPU else "64x64@8"
    shapes = MODELS[case]() if GPU else [LayerShape.parse(case)]
    for kind in TRIED:
        # PEFT's OFT takes minutes for a model
        peers = [name for name in PEERS if (name, kind) != ("peft", "oft")]
        yield lambda k=kind, p=peers: models.merge(shapes, case, k, BF16, device=DEVICE, peers=p, rounds=min(ROUNDS, 3))


def networks() -> Iterator[Cell]:
    """A training step of a whole U-Net and of a decoder, and what waits for backward."""
    size, latents = ("sd15", 64) if GPU else ("tiny", 8)
    layers, width, tokens = (8, 2048, 1024) if GPU else (1, 64, 8)
    diffusion, text = f"{size} U-Net, latents of {latents}²", f"decoder, {7 * layers} Linear of width {width}"

    def measure(kind: str, what: str, dtype: torch.dtype) -> Row:
        made = unet(size, latents, dtype, DEVICE) if what == diffusion else None
        network = made or decoder(layers, width, width // 64, tokens, 1, dtype, DEVICE)
        # Ways that build ΔW of every layer in every step are slower by far: LoRA's stands for all
        left_out = () if kind == "lora" else ("lycoris",)
        return model_step.measure(network, kind, case=what, peers=PEERS, rounds=min(ROUNDS, 5), left_out=left_out)

    for dtype in (BF16, FP32) if GPU else (FP32,):
        for what in (diffusion, text):
            for kind in TRIED:
                yield lambda k=kind, w=what, d=dtype: measure(k, w, d)


def repeats() -> Iterator[Cell]:
    """Whether a training step, and merging, give the same bits a second time."""
    shape = LayerShape(1280, 1280, tokens=4096) if GPU else LayerShape(64, 64, tokens=8)

    def measure(kind: str, dtype: torch.dtype) -> Row:
        layer, x = shape.layer(dtype, DEVICE), shape.input(dtype, DEVICE).requires_grad_()
        g = torch.randn(shape.positions, shape.outputs, dtype=dtype, device=DEVICE)
        model = adapted("ours", kind, Host(layer))
        call = step.step(model, x, g)
        one, two = (call() for _ in range(2))
        assert isinstance(one, tuple) and isinstance(two, tuple)
        merged = [copy.deepcopy(model) for _ in range(2)]
        for each in merged:
            pk.merge(each, backup=None)
        weights = [next(each.parameters()) for each in merged]
        same = {
            "step": all(torch.equal(a, b) for a, b in zip(one, two, strict=True)),
            "merge": torch.equal(*weights),
        }
        return Row("repeats", kind, str(shape), str(dtype).removeprefix("torch."), values=same)

    for dtype in (BF16, FP32):
        for kind in KINDS:
            yield lambda k=kind, d=dtype: measure(k, d)


@dataclass(frozen=True)
class Part:
    """Measurements, how many seconds they may take together, and what they leave out without a GPU."""

    cells: Callable[[], Iterator[Cell]]
    limit: float
    without_gpu: str


#: in this order; the limits are ten minutes together
PARTS = {
    "tests": Part(tests, 90, "the kernels: PyTorch's references are tested in their place"),
    "operators": Part(operator_cells, 160, "the kernels and torch.compile; sizes above 48×64"),
    "step": Part(steps, 120, "fp16 and bf16, kinds but LoRA, layers above 64×64"),
    "merge": Part(merges, 80, "kinds but LoRA, SD 1.5's U-Net: a layer of 64×64 in its place"),
    "network": Part(networks, 110, "kinds but LoRA, bf16, SD 1.5's U-Net: a tiny one in its place"),
    "repeats": Part(repeats, 40, "layers above 64×64"),
}


@dataclass
class Outcome:
    """What became of a part."""

    rows: list[Row]
    cells: int
    seconds: float
    cut: bool = False

    @property
    def failed(self) -> list[str]:
        """What went wrong, in words."""
        found = [] if self.rows else [f"nothing was done in {self.seconds:.0f} s"]
        for row in self.rows:
            failed = row.values.get("failed", [])
            found += [f"{row.question} {row.kind} {row.case}: {each}" for each in failed]
            if row.question == "repeats":
                names = ", ".join(name for name, same in row.values.items() if same is False)
                found += [f"{row.kind} in {row.dtype}: other bits the second time: {names}"] if names else []
        return found


def run_part(name: str) -> Outcome:
    """Run a part in processes of its own until it is through or its time is up."""
    part = PARTS[name]
    cells, start = len(list(part.cells())), time.monotonic()
    outcome = Outcome([], cells, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder) / "rows.json", Path(folder) / "errors.txt"
        while len(outcome.rows) < cells and not outcome.cut:
            command = [sys.executable, __file__, "--part", name, "--first", str(len(outcome.rows)), "--json", str(file)]
            file.unlink(missing_ok=True)
            outcome.cut = not _ends(command, errors, part.limit - (time.monotonic() - start))
            outcome.rows += read(file) if file.is_file() else []
            if not outcome.cut and len(outcome.rows) < cells:
                # The next measurement ended the process: it is recorded, and the one after it begins anew
                said = errors.read_text().strip().splitlines()
                outcome.rows.append(
                    Row(name, "measurement", str(len(outcome.rows) + 1), values={"failed": said[-1:] or ["no message"]})
                )
    outcome.seconds = time.monotonic() - start
    return outcome


def _ends(command: list[str], output: Path, seconds: float) -> bool:
    """Whether a command ends in time; else it is ended, with all that it started."""
    with output.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
        try:
            process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return True


def table(outcomes: dict[str, Outcome]) -> Table:
    """Return a table of what was done, and of what was not."""
    shown = Table("part", "done", "seconds", "left out", box=SIMPLE_HEAD)
    for name, outcome in outcomes.items():
        cut = f"cut after {PARTS[name].limit:.0f} s" if outcome.cut else ""
        left_out = cut or ("" if GPU else PARTS[name].without_gpu)
        shown.add_row(name, f"{len(outcome.rows)} of {outcome.cells}", f"{outcome.seconds:.0f}", left_out)
    return shown


def main() -> None:
    script = Script(__file__, __doc__)
    script.parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    script.parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # what run_part starts
    script.parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    arguments = script.parse()
    script.runner.device = DEVICE
    if arguments.part:
        script.runner.measure(list(PARTS[arguments.part].cells())[arguments.first :])
        return
    parts = [name for name in arguments.parts.split(",") if name]
    if unknown := [name for name in parts if name not in PARTS]:
        script.parser.error(f"--parts {unknown[0]}: one or more of {', '.join(PARTS)} were expected")
    script.runner.path = arguments.json
    if GPU and arguments.json is None:
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        script.runner.path = script.results.with_name(f"{name}.json")
    outcomes = {}
    for part in parts:
        script.print(f"{part}: at most {PARTS[part].limit:.0f} s")
        outcomes[part] = run_part(part)
        script.runner.rows += outcomes[part].rows
        script.runner.write()
    for question in dict.fromkeys(row.question for row in script.runner.rows):
        script.show([row for row in script.runner.rows if row.question == question], question)
    script.print(table(outcomes))
    if not GPU:
        script.print("PyTorch finds no GPU: every part ran on the CPU with tiny shapes, and nothing was measured")
    script.print(f"wrote {script.runner.path}" if script.runner.path else "nothing was written")
    failed = [f"{name}: {each}" for name, outcome in outcomes.items() for each in outcome.failed]
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
