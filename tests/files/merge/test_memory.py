"""The memory of a merge: a few times the largest tensor that changes.

What counts is what the merge holds: neither modules that torch imports at the first use of a device, nor blocks that
were freed and that the allocator has not returned yet, whose number differs from run to run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftkit.files.formats import container
from tests.support.files import write
from tests.support.processes import RETURN_FREED, run_python

pytestmark = pytest.mark.processes

MEMORY = """
import json, os, sys, threading
import torch, peftkit as pk
import torch._dynamo  # 80 MB, which torch imports at its first operation on the device "meta"
torch.set_num_threads(1)
pk.merge_checkpoint
from peftkit.adapters.dora import DoRA
import peftkit.delta.truncation

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def measure(base, adapter, out):
    before, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    report = pk.merge_checkpoint(base, {adapter: 0.7}, out, dtype=getattr(torch, dtype) if dtype else None)
    done.set()
    watcher.join()
    return peak[0] - before, report.norm

base, out, dtype, *adapters = sys.argv[1:]
results = {}
for adapter in adapters:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.write(write, json.dumps(measure(base, adapter, out)).encode())
        finally:
            os._exit(0)
    os.close(write)  # or a child that dies would leave its parent reading for ever
    results[os.path.basename(adapter)] = json.loads(os.read(read, 1000))
    os.wait()
    os.unlink(out)
print(json.dumps(results))
"""


def test_memory_is_a_few_times_the_largest_tensor_that_changes(tmp_path: Path) -> None:
    """Into 300 MB whose largest changed tensor is 20 MB: beside the interpreter at most 3·20 MB and 100 MB."""
    rows = columns = 2240  # 20 MB of fp32
    sizes = {f"layer{i}.weight": ("F32", (rows, columns), 4 * rows * columns) for i in range(5)}
    sizes |= {f"other{i}.weight": ("F32", (5000, 5000), 100_000_000) for i in range(2)}
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    folder = shared / f"peftkit-{os.getpid()}"
    folder.mkdir()
    try:
        base = folder / "base.safetensors"
        torch.manual_seed(0)
        weight = torch.randn(rows, columns)
        with base.open("wb") as file:  # the others are zeros that no block of the file system holds
            file.write(container.header(sizes, {}))
            end = file.tell() + sum(size for _, _, size in sizes.values())
            for _ in range(5):
                file.write(container.raw(weight))
            file.truncate(end)
        made = {
            "lora": {"lora_up.weight": torch.randn(rows, 16), "lora_down.weight": torch.randn(16, columns)},
            "loha": {
                f"hada_w{i}_{side}": torch.randn(*((rows, 8) if side == "a" else (8, columns)))
                for i in (1, 2)
                for side in "ab"
            },
            "lokr": {"lokr_w1": torch.randn(8, 8), "lokr_w2": torch.randn(rows // 8, columns // 8)},
            "full": {"diff": torch.randn(rows, columns)},
        }
        made["dora"] = {**made["lora"], "dora_scale": torch.rand(rows, 1)}
        files = []
        for kind, tensors in made.items():
            files.append(folder / kind)
            save_file({f"lycoris_layer{i}.{k}": t.clone() for i in (0, 3) for k, t in tensors.items()}, files[-1])
        found = run_python(MEMORY, base, folder / "out.safetensors", "", *files, environment=RETURN_FREED)
        assert all(norm > 100 for _, norm in found.values()), "nothing was merged"
        used = {kind: f"{peak / 1e6:.0f} MB" for kind, (peak, _) in found.items()}
        assert max(peak for peak, _ in found.values()) <= 3 * 20_100_000 + 100_000_000, used
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("own, target", [("float16", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")])
def test_memory_is_as_small_where_the_dtype_changes(own: str, target: str, tmp_path: Path) -> None:
    size = 6000
    weight = torch.randn(size, size).to(getattr(torch, own))
    base, file = write(tmp_path / "base.safetensors", {"a.weight": weight}), tmp_path / "lora"
    save_file({"a.lora_up.weight": torch.randn(size, 4), "a.lora_down.weight": torch.randn(4, size)}, file)
    out = tmp_path / "out.safetensors"
    ((peak, norm),) = run_python(MEMORY, base, out, target, file, environment=RETURN_FREED).values()
    assert norm > 100
    assert peak <= 3 * weight.nbytes + 100_000_000, f"{peak / 1e6:.0f} MB"
