"""The operators on the CPU; and, each in a process of its own, the kernels interpreted and compiled for absent GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import peftkit as pk
from peftkit import kernels
from peftkit.delta import Hadamard
from peftkit.errors import OptionError
from peftkit.kernels import ops

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build here")


def process(*command: str, **environment: str) -> str:
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=own, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_the_kernels_interpreted() -> None:
    """Numerics on odd shapes, repeatability, large offsets, the operators' schemas, and what follows a failure."""
    said = process(
        "-m", "pytest", "-rs", "-p", "no:cacheprovider", "tests/kernels/interpreted.py", TRITON_INTERPRET="1"
    )
    assert "[100%]" in said
    assert "SKIPPED" not in said


@needs_triton
def test_the_kernels_compiled_ahead_of_time(tmp_path: Path) -> None:
    """For sm_80, sm_90 and, forward, gfx942: no spills, no atomics, 128-bit accesses, tensor cores."""
    script = "tests/kernels/ahead_of_time.py"
    found = json.loads(process("-W", "ignore", script, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)))
    assert len(found) == 2 * (2 * 4 + 3)
    for name, kernel in found.items():
        assert kernel["spills"] <= (5 if "backward" in name else 0), name
        assert kernel["atomics"] == 0, name
        assert kernel["shared"] <= 105 * 1024, name
        if name.startswith("sm"):
            assert kernel["tensor"] > 0, name
            assert kernel["wide loads"] > 0, name
            assert kernel["wide stores"] > 0 or "moments" in name, name


def factors(*, m: int = 6, n: int = 5, r: int = 2) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((m, r), (r, n), (m, r), (r, n))]


def test_hadamard_differentiates() -> None:
    torch.autograd.gradcheck(ops.hadamard, factors())
    torch.autograd.gradgradcheck(ops.hadamard, factors())


def test_hadamard_keeps_only_its_factors() -> None:
    own = factors(m=64, n=80)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        Hadamard(*own).dense()
    assert sum(kept) == sum(f.numel() for f in own)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_operators_inside_a_compiled_function() -> None:
    own, W = [f.detach() for f in factors()], torch.randn(6, 5, dtype=torch.float64)

    def function(W: Tensor) -> Tensor:
        return ops.delta(W, own, "hadamard", 0.5, None).relu() + ops.moments(W, own, "hadamard")[0][:, None]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(W), function(W))


@pytest.mark.parametrize("structure", list(ops.STRUCTURES))
def test_the_reference_is_the_definition(structure: str) -> None:
    sizes = {
        "lowrank": [(6, 2), (2, 5)],
        "hadamard": [(6, 2), (2, 5)] * 2,
        "kron": [(3, 1), (2, 5)],
        "rotation": [(3, 2, 2), (6, 5)],
    }
    own = [torch.randn(size, dtype=torch.float64) for size in sizes[structure]]
    W, row = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    dense = ops.STRUCTURES[structure](*own).dense()
    torch.testing.assert_close(ops.delta(None, own, structure, 1.0, None), dense)
    torch.testing.assert_close(ops.delta(W, own, structure, 0.3, row), row[:, None] * (W + 0.3 * dense))
    torch.testing.assert_close(ops.moments(W, own, structure), torch.stack([(W * dense).sum(1), dense.square().sum(1)]))


def test_use_is_undone_and_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.kernels import choosing

    with pytest.raises(ZeroDivisionError), kernels.use("torch"), kernels.use("auto"):
        raise ZeroDivisionError
    assert choosing._backend.get() == "auto"
    with pytest.raises(OptionError, match="'auto', 'torch', 'triton'"), kernels.use("cuda"):
        pass
    monkeypatch.setattr(choosing, "installed", lambda: False)
    with pytest.raises(OptionError, match="not installed"), kernels.use("triton"):
        pass


def test_the_cpu_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, peftkit as pk\n"
        "layer = torch.nn.Linear(8, 8); pk.wrap(layer, 'loha', rank=2, route='dense')\n"
        "layer(torch.randn(2, 8)).sum().backward(); pk.merge(layer)"
    )
    process("-c", code)
    assert pk.kinds()
