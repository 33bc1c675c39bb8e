"""Merging a rank-16 LoCon into an 860M-parameter fp16 checkpoint, file to file: time over copying the file, and memory.

    python benchmarks/checkpoint.py [--folder DIR] [--pairs 5] [--kinds lora] [--lycoris] [--save]

The checkpoint has the shapes of Stable Diffusion 1.5's U-Net and random weights. Merges and copies alternate in one run
and their ratio is of medians; both flush to disk. Memory is the merging process's anonymous memory beyond that of the
interpreter with torch and peftkit imported, at its highest, sampled every 5 ms.

--lycoris: also lycoris-lora's own merge, which works on a model: its process reads the same weights under diffusers'
names straight into a model without any, merges, and writes the result. It takes its turn once.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from peftkit.bench.rows import Row
from peftkit.bench.script import Script
from peftkit.files.families.names import FAMILIES, ModuleSpec
from peftkit.files.formats import container, disk

#: what a merging process does around the merge itself
_MEASURED = """
import json, sys, threading, time
import torch
{imports}
torch.set_num_threads(1)
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
peak, done, before = [0], threading.Event(), anonymous()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
{merge}
seconds = time.perf_counter() - start
done.set()
watcher.join()
print(json.dumps({{"seconds": seconds, "memory": peak[0] - before}}))
"""

_OURS = _MEASURED.format(
    imports="import peftkit as pk; pk.merge_checkpoint  # imported before memory is looked at",
    merge="pk.merge_checkpoint(sys.argv[1], {sys.argv[2]: 0.8}, sys.argv[3])",
)

_LYCORIS = _MEASURED.format(
    imports="""
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from lycoris import modules
from lycoris.utils import merge
from safetensors.torch import load_file, save_file
""",
    merge="""
with torch.device("meta"):
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
unet.load_state_dict(load_file(sys.argv[1]), assign=True)
sys.stdout, printed = sys.stderr, sys.stdout
merge([], unet, load_file(sys.argv[2]), 0.8)
sys.stdout = printed
save_file(unet.state_dict(), sys.argv[3])
""",
)


def modules() -> list[ModuleSpec]:
    """The weights of the U-Net."""
    return [m for m in FAMILIES["sd15"].modules.values() if m.name.startswith("unet.")]


def make_checkpoint(path: Path, diffusers: bool = False) -> int:
    """Random fp16 weights under the names of the published file, or diffusers'; returns the number of parameters."""
    tensors: dict[str, tuple[int, ...]] = {}
    for module in modules():
        own = module.name.removeprefix("unet.")
        tensors[f"{own}.weight" if diffusers else module.original] = module.shape
        if module.original_bias is not None:
            tensors[f"{own}.bias" if diffusers else module.original_bias] = module.shape[:1]
    sizes = {key: ("F16", shape, 2 * torch.Size(shape).numel()) for key, shape in sorted(tensors.items())}
    generator = torch.Generator().manual_seed(0)
    with disk.atomic(path) as file:
        file.write(container.header(sizes, {"format": "pt"}))
        for _, shape, _ in sizes.values():
            file.write(container.raw((torch.randn(shape, generator=generator) * 0.02).half()))
    return sum(torch.Size(shape).numel() for shape in tensors.values())


def make_adapter(path: Path, rank: int, kind: str) -> int:
    """A file as kohya's tools write it, over every Linear and convolution; returns how many."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    adapted = [m for m in modules() if len(m.shape) > 1]
    for module in adapted:
        name = FAMILIES["sd15"].spell(module.name, "kohya")
        rows, channels, *kernel = module.shape
        fan_in = channels * torch.Size(kernel).numel()

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * 0.02).half()

        if kind == "lora":
            tensors[f"{name}.lora_up.weight"] = draw(rows, rank, *(1,) * len(kernel))
            tensors[f"{name}.lora_down.weight"] = draw(rank, channels, *kernel)
        else:
            for half in ("w1", "w2"):
                tensors[f"{name}.hada_{half}_a"] = draw(rows, rank)
                tensors[f"{name}.hada_{half}_b"] = draw(rank, fan_in)
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    container.write(path, tensors, {})
    return len(adapted)


def merge(base: Path, adapter: Path, out: Path, code: str = _OURS) -> dict[str, float]:
    """One merge in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, base, adapter, out],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def copy(source: Path, out: Path) -> float:
    """Seconds to copy a file and flush it."""
    start = time.perf_counter()
    shutil.copyfile(source, out)
    with out.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def measure(folder: Path, kind: str, rank: int, pairs: int, lycoris: bool) -> Row:
    """Merge and copy in turns, then merge once as lycoris does.

    Args:
        folder: where files may be put.
        kind: "lora" or "loha".
        rank: of the adapter.
        pairs: how many merges and copies.
        lycoris: whether lycoris-lora's merge is measured too.
    """
    base, adapter, out = (folder / f"{name}.safetensors" for name in ("base", "adapter", "out"))
    parameters = make_checkpoint(base)
    adapted = make_adapter(adapter, rank, kind)
    merges, copies = [], []
    for _ in range(pairs):
        copies.append(copy(base, out))
        merges.append(merge(base, adapter, out))
    largest = max(2 * torch.Size(m.shape).numel() for m in modules())
    values: dict[str, Any] = {
        "parameters": parameters,
        "adapter": f"{kind} rank {rank}, {adapted} weights",
        "adapter MB": round(adapter.stat().st_size / 1e6),
        "merge / copy": round(statistics.median(m["seconds"] for m in merges) / statistics.median(copies), 2),
        "merge seconds": [round(m["seconds"], 2) for m in merges],
        "copy seconds": [round(c, 2) for c in copies],
        "memory MB": round(max(m["memory"] for m in merges) / 1e6),
        "bound MB": round((3 * largest + 100e6) / 1e6),
    }
    if lycoris:
        for file in (base, out):
            file.unlink()
        make_checkpoint(base, diffusers=True)
        theirs, ours = merge(base, adapter, out, _LYCORIS), merge(base, adapter, out)
        values["lycoris / merge"] = round(theirs["seconds"] / ours["seconds"], 1)
        values["lycoris memory MB"] = round(theirs["memory"] / 1e6)
    return Row("checkpoint", kind, f"SD 1.5 U-Net, {adapted} weights", "float16", values=values)


def main() -> None:
    script = Script(__file__, __doc__, kinds=("lora", "loha"))
    script.parser.set_defaults(kinds="lora")
    script.parser.add_argument("--folder", type=Path, help="where to put 5 GB for a minute; a temporary one by default")
    script.parser.add_argument("--pairs", type=int, default=5, help="merges and copies")
    script.parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    script.parser.add_argument("--lycoris", action="store_true", help="measure lycoris-lora's merge too")
    arguments = script.parse()

    def cell(kind: str) -> Row:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            return measure(Path(folder), kind, arguments.rank, arguments.pairs, arguments.lycoris)

    rows = script.run([lambda kind=kind: cell(kind) for kind in arguments.kinds])
    if any(row.values["memory MB"] > row.values["bound MB"] for row in rows):
        sys.exit("the merge used more memory than it may")


if __name__ == "__main__":
    main()
