"""The operators on the CPU and what decides who runs them; in other processes the kernels, interpreted and compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import peftkit as pk
from benchmarks import roofline
from peftkit import kernels
from peftkit.delta import Hadamard
from peftkit.errors import OptionError
from peftkit.kernels import operators
from peftkit.kernels.blocks import BLOCK
from tests.support.paths import ROOT


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def hadamard(m: int, n: int, r: int, dtype: torch.dtype = torch.float64) -> Hadamard:
    return Hadamard(*(factor.requires_grad_() for factor in normal((m, r), (r, n), (m, r), (r, n), dtype=dtype)))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("module, interpreted", [("interpreted", "1"), ("compiled", "0")])
def test_in_another_process(module: str, interpreted: str) -> None:
    """Triton is in one mode or the other from its import on."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/kernels/{module}.py"],
        cwd=ROOT,
        env={**environment, "TRITON_INTERPRET": interpreted},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_operators_mean() -> None:
    delta, (base,) = hadamard(6, 8, 2), normal((6, 8))
    factors, dense = [factor.detach() for factor in delta.factors], delta.dense().detach()
    assert torch.allclose(operators.hadamard(None, factors, 1.0), dense)
    assert torch.allclose(operators.hadamard(base, factors, 0.3), base + 0.3 * dense)
    moments = torch.stack([(base * dense).sum(1), dense.square().sum(1)])
    assert torch.allclose(operators.hadamard_moments(base, factors), moments)
    torch.library.opcheck(operators.hadamard, (base, factors, 0.3))
    torch.library.opcheck(operators.hadamard_moments, (base, factors))


def test_what_16_bits_hold_is_rounded_once() -> None:
    delta, (base,) = hadamard(6, 8, 2, torch.bfloat16), normal((6, 8), dtype=torch.bfloat16)
    factors = [factor.detach() for factor in delta.factors]
    wide = Hadamard(*(factor.float() for factor in factors)).dense()
    assert torch.equal(operators.hadamard(None, factors, 1.0), wide.bfloat16())
    assert torch.equal(operators.hadamard(base, factors, 0.3), (0.3 * wide + base.float()).bfloat16())
    assert operators.hadamard_moments(base, factors).dtype == torch.float32


def test_gradients_of_hadamard() -> None:
    delta, (base,) = hadamard(5, 7, 3), normal((5, 7))

    def f(base: Tensor, *factors: Tensor) -> Tensor:
        return operators.differentiable_hadamard(base, factors, 0.3)

    inputs = (base.requires_grad_(), *delta.factors)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    torch.library.opcheck(operators.hadamard_backward, (base.detach(), [t.detach() for t in delta.factors], 0.3))


@pytest.mark.parametrize("what", [Hadamard.dense, lambda delta: delta.added_to(torch.ones(delta.shape))])
def test_nothing_of_the_size_of_the_weight_waits_for_backward(what: Callable[[Hadamard], Tensor]) -> None:
    """A graph of ΔW keeps its factors, and its backward makes a few blocks of rows and no matrix."""
    delta = hadamard(1 << 10, 1 << 11, 2, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda t: t):
        out = what(delta)
    assert kept
    assert max(tensor.numel() for tensor in kept) <= 2 * (1 << 11)
    upstream = torch.ones_like(out)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients = torch.autograd.grad(out, delta.factors, upstream)
    assert max(event.cpu_memory_usage for event in profile.events() or []) <= 4 * BLOCK
    B1, A1, B2, A2 = delta.factors
    expected = torch.autograd.grad((B1 @ A1) * (B2 @ A2), (B1, A1, B2, A2), upstream)
    for gradient, value in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, value, rtol=1e-4, atol=1e-3)


# what torch.compile itself does to trace an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_wrapped_model_compiles_in_one_graph() -> None:
    model = nn.Linear(700, 500)
    pk.wrap(model, "loha", rank=2, route="dense")
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    results, graphs = [], []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(3, 700)
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), pk.adapter_parameters(model))))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    torch.compile(model, fullgraph=True, backend=counting)(x)
    assert len(graphs) == 1


def test_autocast_changes_no_bit() -> None:
    """Neither of ΔW nor of its gradients, where backward is called inside too."""
    delta = hadamard(1 << 9, 1 << 10, 3, torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = operators.differentiable_hadamard(None, delta.factors, 0.3)
            results.append((out, *torch.autograd.grad(out, delta.factors, torch.ones_like(out))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("choice", ["cuda", "tritn", ""])
def test_an_unknown_choice(choice: str) -> None:
    with pytest.raises(OptionError, match=f"got {choice!r}, expected one of auto, torch, triton"), kernels.use(choice):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_where_it_cannot_run_says_why() -> None:
    with pytest.raises(OptionError, match="PyTorch finds no GPU"), kernels.use("triton"):
        pass
    (tensor,) = normal((3, 3))
    assert kernels.refusal("hadamard", [tensor], []) == "PyTorch finds no GPU"
    with kernels.use("torch"), kernels.use("auto"), kernels.use("torch"):
        assert kernels.refusal("hadamard", [tensor], []) == "kernels.use('torch') is in force"
    assert kernels.refusal("hadamard", [tensor], []) == "PyTorch finds no GPU"


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


@pytest.mark.parametrize("operator", roofline.OPERATORS, ids=lambda operator: operator.name)
def test_the_roofline_counts_what_eager_does(operator: roofline.Operator) -> None:
    """Its flops and passes over memory are those of the code that stands beside the kernel, and the two agree."""
    m, n, r = 48, 64, 4
    W, factors = roofline.inputs(m, n, r, "cpu", torch.float64)
    with FlopCounterMode(display=False) as flops, _Passes(m * n) as passes:
        eager = operator.eager(W, factors)
    assert flops.get_total_flops() == 2 * operator.products[1] * m * n * r
    assert passes.count == operator.passes[1]
    ours = operator.kernel(W, factors)
    for value, other in zip(ours, eager, strict=True):
        assert torch.allclose(value, other)
    for rows in roofline.modelled(operator, m, n, r).values():
        assert rows["floor us"] <= rows["eager us"]


@pytest.mark.parametrize("operator", [o for o in roofline.OPERATORS if o.lycoris], ids=lambda operator: operator.name)
def test_the_roofline_asks_lycoris_for_the_same(operator: roofline.Operator) -> None:
    W, factors = roofline.inputs(12, 8, 4, "cpu", torch.float32)
    assert operator.lycoris is not None
    for _ in range(2):
        torch.testing.assert_close(operator.lycoris(W, factors), operator.eager(W, factors))


def test_the_roofline_is_printed() -> None:
    command = [sys.executable, "benchmarks/roofline.py", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    rows = json.loads(done.stdout)
    assert len(rows) == len(roofline.OPERATORS) * len(roofline.SHAPES)
    (merge,) = (row for row in rows if row["operator"] == "LoHa W + λΔW" and row["shape"] == [4096, 4096, 32])
    # 2·4096² numbers of two bytes at 85 % of 3.35 TB/s
    assert merge["H100"]["floor bytes"] == 4 * 4096**2
    assert merge["H100"]["floor us"] == 23.6
