"""The kernels compiled for GPUs that are not here, through the code that launches them; prints what came of it as JSON.

python tests/kernels/ahead_of_time.py, without TRITON_INTERPRET
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from peftkit.kernels.triton import launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SIZE = 4096


class Absent:
    """Stands for the driver of a GPU that is not here: enough for the compiler to be asked."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[tuple[str, Any]]]:
    """Inside, launching a kernel on CPU tensors compiles what the GPU would run, and runs nothing."""
    built: list[tuple[str, Any]] = []
    launching, active = triton.KernelInterface.__getitem__, driver._active

    def compile_only(kernel: Any, grid: Any) -> Any:
        return lambda *args, **kw: built.append((kernel.__name__, kernel.warmup(*args, grid=grid, **kw)))

    driver.set_active(Absent(target))
    triton.KernelInterface.__getitem__ = compile_only
    try:
        yield built
    finally:
        triton.KernelInterface.__getitem__, driver._active = launching, active


def launches(rank: int, backward: bool) -> Iterator[str]:
    """Everything that is launched, with the name of each."""
    W = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    factors = [torch.empty(s, dtype=torch.bfloat16) for s in ((SIZE, rank), (rank, SIZE)) * 2]
    launch.delta("hadamard", factors, 0.5, W, None)
    yield "merge"
    launch.moments("hadamard", factors, W)
    yield "moments"
    if backward:
        launch.hadamard_backward(W, factors)
        yield "backward"
    else:
        launch.delta("lowrank", factors[:2], 0.5, W, None)
        yield "lowrank"


def report(kernel: Any) -> dict[str, int]:
    """Registers, shared memory and instructions of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        found = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
        atomics = len(re.findall(r"^\s+(?:global|flat)_atomic", text, re.MULTILINE))
        return {"spills": int(found[1]) if found else 0, "atomics": atomics, "shared": kernel.metadata.shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([str(TOOLS / tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, instruction)) for instruction in instructions)

    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return {
        "registers": int(registers[1]),
        "spills": count(r"STL|LDL"),
        "atomics": count(r"ATOM|RED\b"),
        "tensor": count(r"HMMA|HGMMA"),
        "wide loads": count(r"(LDG|LDGSTS).*\.128"),
        "wide stores": count(r"STG.*\.128"),
        "shared": kernel.metadata.shared,
    }


def main() -> None:
    targets = {
        "sm_80": GPUTarget("cuda", 80, 32),
        "sm_90": GPUTarget("cuda", 90, 32),
        "gfx942": GPUTarget("hip", "gfx942", 64),
    }
    found = {}
    for name, target in targets.items():
        for rank in (16, 64):
            with compiling(target) as built:
                for launched in launches(rank, target.backend == "cuda"):
                    for i, (_, kernel) in enumerate(built):
                        found[f"{name} {launched}{i or ''} r{rank}"] = report(kernel)
                    built.clear()
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
