"""The operators as benchmarks know them: what is counted is what is done, and every way does the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from peftkit.bench import operators, rows
from peftkit.bench.operators import OPERATORS, Operator, inputs
from peftkit.errors import BenchError
from tests.support.paths import ROOT


class _Passes(TorchDispatchMode):
    """How many matrices of a size the calls of PyTorch within the block read and write."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(isinstance(t, Tensor) and t.numel() == self.size for t in (*args, out))
        return out


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_roofline_counts_what_eager_does(operator: Operator) -> None:
    """Its flops and passes over memory are those of the code that stands beside the kernel, and the two agree."""
    m, n, r = 48, 64, 4
    W, factors = inputs(m, n, r, "cpu", torch.float64)
    with FlopCounterMode(display=False) as flops, _Passes(m * n) as passes:
        eager = operator.eager(W, factors)
    assert flops.get_total_flops() == 2 * operator.products[1] * m * n * r
    assert passes.count == operator.passes[1]
    ours = operator.kernel(W, factors)
    for value, other in zip(ours, eager, strict=True):
        assert torch.allclose(value, other)
    for cell in roofline.modelled(operator, m, n, r).values():
        assert cell["floor us"] <= cell["eager us"]


@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.lycoris], ids=lambda operator: operator.name)
def test_the_roofline_asks_lycoris_for_the_same(operator: Operator) -> None:
    W, factors = inputs(12, 8, 4, "cpu", torch.float32)
    assert operator.lycoris is not None
    for _ in range(2):
        torch.testing.assert_close(operator.lycoris(W, factors), operator.eager(W, factors))


@pytest.mark.processes
def test_the_roofline_is_written(tmp_path: Path) -> None:
    out = tmp_path / "roofline.json"
    command = [sys.executable, "benchmarks/roofline.py", "--json", out]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
    found = rows.read(out)
    assert len(found) == len(OPERATORS) * len(roofline.SHAPES)
    (merge,) = (row for row in found if (row.kind, row.case) == ("LoHa W + λΔW", "4096×4096, r 32"))
    # 2·4096² numbers of two bytes at 85 % of 3.35 TB/s
    assert merge.values["H100"]["floor bytes"] == 4 * 4096**2
    assert merge.values["H100"]["floor us"] == 23.6


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_way_of_an_operator_is_timed(operator: Operator) -> None:
    row = operators.measure(operator, (24, 32, 4), torch.float32, device="cpu", rounds=1)
    assert set(row.ratio) == {"ours", *(["lycoris"] if operator.lycoris else [])}
    assert row.error is not None
    assert row.error < 1e-6
    assert row.values["repeats"]


def test_a_wrong_operator_is_not_timed() -> None:
    wrong = replace(OPERATORS[0], kernel=lambda W, f: 1.01 * OPERATORS[0].kernel(W, f))
    with pytest.raises(BenchError, match="nothing was timed"):
        operators.measure(wrong, (24, 32, 4), torch.float32, device="cpu", rounds=1)
