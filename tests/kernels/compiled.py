"""What the kernels become on GPUs that are not here: test_kernels.py gives this a process, without the interpreter.

The launches are those of the package, on tensors of the CPU: each stops at the machine code, which is then read.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from peftkit.kernels.triton import launch

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

#: bytes of shared memory that a program may have: sm_80 gives up to 163 KiB, and sm_90 twice this
SHARED = 104 << 10

#: capability, rank, dtype; of 32 bits, the widest backward where it has the fewest registers to spare
CASES = [(80, 32, torch.bfloat16), (90, 32, torch.bfloat16), (80, 128, torch.bfloat16), (90, 128, torch.bfloat16)]
CASES += [(80, 32, torch.float32)]

Compile = Callable[[GPUTarget, Callable[[], object]], list[Any]]


class _Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        del device
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compile:
    """The kernels that a call would have launched on some target."""
    kernels: list[Any] = []

    def __getitem__(self: Any, grid: Any) -> Callable[..., None]:  # noqa: N807
        return lambda *arguments, **options: kernels.append(self.warmup(*arguments, grid=grid, **options))

    def run(target: GPUTarget, call: Callable[[], object]) -> list[Any]:
        monkeypatch.setattr(driver, "_active", _Target(target))
        call()
        return kernels

    monkeypatch.setattr(triton.KernelInterface, "__getitem__", __getitem__)
    return run


def instructions(kernel: Any, folder: Path) -> list[str]:
    """The instructions of a kernel for NVIDIA, such as LDG.E.128."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([NVIDIA / "nvdisasm", "-c", binary], check=True, capture_output=True, text=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing)


def of(instructions: list[str], pattern: str) -> list[str]:
    return [instruction for instruction in instructions if re.match(pattern, instruction)]


def factors(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.zeros(4096, rank, dtype=dtype), torch.zeros(rank, 4096, dtype=dtype)] * 2


@pytest.mark.parametrize("capability, rank, dtype", CASES, ids=str)
def test_on_nvidia(capability: int, rank: int, dtype: torch.dtype, compiled: Compile, tmp_path: Path) -> None:
    """No register is spilled but by the widest backward, nothing is atomic, and matrices move 128 bits at a time."""
    weight, ours = torch.zeros(4096, 4096, dtype=dtype), factors(rank, dtype)

    def every_launch() -> None:
        if rank == 32:  # these two take the ranks in steps, and are the same at any
            launch.hadamard(weight, ours, 0.5)
            launch.hadamard_moments(weight, ours)
        launch.hadamard_backward(weight, ours, 0.5)

    kernels = compiled(GPUTarget("cuda", capability, 32), every_launch)
    names = ["hadamard_kernel", "hadamard_moments_kernel"] if rank == 32 else []
    assert [kernel.metadata.name for kernel in kernels] == [*names, *["hadamard_backward_kernel"] * 2]
    for kernel in kernels:
        name, code = kernel.metadata.name, instructions(kernel, tmp_path)
        assert len(code) > 100
        assert len(of(code, r"STL|LDL")) <= (5 if name == "hadamard_backward_kernel" else 0)
        assert not of(code, r"(ATOM\w*|RED)(\.|$)")
        assert of(code, r"LDG.*\.128")
        if name != "hadamard_moments_kernel":  # which stores two numbers a row
            assert all(".128" in store for store in of(code, r"STG"))
            assert of(code, r"STG")
        if dtype == torch.bfloat16:
            assert of(code, {80: "HMMA", 90: "HGMMA"}[capability])
        assert kernel.metadata.shared <= SHARED


def test_forward_on_amd(compiled: Compile) -> None:
    def forward() -> None:
        weight = torch.zeros(4096, 4096, dtype=torch.bfloat16)
        launch.hadamard(weight, factors(32, torch.bfloat16), 0.5)
        launch.hadamard_moments(weight, factors(32, torch.bfloat16))

    kernels = compiled(GPUTarget("hip", "gfx942", 64), forward)
    assert [kernel.metadata.name for kernel in kernels] == ["hadamard_kernel", "hadamard_moments_kernel"]
    for kernel in kernels:
        code = kernel.asm["amdgcn"]
        assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code) == ["0", "0"]
        assert "mfma" in code
        assert "atomic" not in code
        assert kernel.metadata.shared <= 64 << 10
