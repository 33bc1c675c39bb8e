"""A base of ten gigabytes and an adapter of one, in files without a byte on disk, are planned and inspected quickly."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

SIZE, RANK, LAYERS = 3584, 96, 400
#: seconds of one core; an inspection with norms reads the whole adapter
SECONDS = {"plan": 2.0, "inspect": 2.0, "norms": 4.0}
#: bytes beside the interpreter with torch in it
MEMORY = 200_000_000

_MEASURED = """
import resource, sys, time
import peftkit as pk

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

verb, base, adapter = sys.argv[1:]
verbs = {"plan": lambda: pk.plan_merge(base, {adapter: 1.0}), "norms": lambda: pk.inspect(adapter)}
verbs["inspect"] = lambda: pk.inspect(adapter, norms=False)
pk.plan_merge, pk.inspect  # imported on demand
memory, begun = peak(), time.process_time()
verbs[verb]()
print(time.process_time() - begun, peak() - memory)
"""


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, itemsize: int) -> Path:
    """A file of zeros that takes no room: its header, and a hole."""
    head: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        size = shape[0] * shape[1] * itemsize
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("verb", SECONDS)
def test_large_files_are_planned_and_inspected_in_little_time_and_memory(verb: str, tmp_path: Path) -> None:
    names = [f"blocks.{i}" for i in range(LAYERS)]
    base = sparse(tmp_path / "base.safetensors", {f"{name}.weight": (SIZE, SIZE) for name in names}, "BF16", 2)
    factors = {"lora_up": (SIZE, RANK), "lora_down": (RANK, SIZE)}
    shapes = {f"{name}.{factor}.weight": shape for name in names for factor, shape in factors.items()}
    adapter = sparse(tmp_path / "a.safetensors", shapes, "F32", 4)
    assert base.stat().st_size > 10**10 and adapter.stat().st_size > 10**9
    command = [sys.executable, "-c", _MEASURED, verb, base, adapter]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    seconds, memory = map(float, ran.stdout.split())
    assert seconds < SECONDS[verb] and memory < MEMORY
