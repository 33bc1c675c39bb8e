"""The operators on the CPU and what decides who runs them; in other processes the kernels, interpreted and compiled."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
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


def _has_triton() -> bool:
    """Asked without importing it, which would settle whether it interprets."""
    try:
        return tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 3)
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.processes
@pytest.mark.skipif(not _has_triton(), reason="Triton is not installed, or older than 3.3")
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
    with (
        pytest.raises(OptionError, match=f"choice={choice!r} was given, 'auto', 'torch' or 'triton'"),
        kernels.use(choice),
    ):
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
