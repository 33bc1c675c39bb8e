"""Forward-mode AD, torch.func, batches of gradients and tracers see every operation of an adapted layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.func import functional_call

import peftkit as pk
from tests.support.laws import REFUSALS, agree, wrapped
from tests.support.zoo import ADAPTERS, STRUCTURES

LAYERS = ("linear", "conv2d k1", "conv2d k3", "conv2d g2 d2", "transposed2d")


def _compiled() -> Iterator[Any]:
    """The cells to compile: every adapter on two layers, and one of each structure on the others, in every run."""
    for adapter, layer in itertools.product(ADAPTERS, ("linear", "conv2d k3", "conv2d k1", "transposed2d")):
        rare = layer in ("conv2d k1", "transposed2d") and adapter not in STRUCTURES
        yield pytest.param(adapter, layer, marks=[pytest.mark.slow] if rare else [])


@pytest.fixture(params=ADAPTERS)
def cells(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every layer that the adapter takes, on every route, with an input."""

    def each() -> Iterator[tuple[str, nn.Module, Tensor]]:
        for layer in LAYERS:
            for route in ("auto", "factored", "dense"):
                try:
                    module, x = wrapped(request.param, layer, route=route)
                except REFUSALS:
                    continue
                yield f"{layer}, {route}", module, x

    return each()


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


# what torch itself does at its first use of forward-mode AD
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_differentiates_the_input(cells: Iterator[tuple[str, nn.Module, Tensor]]) -> None:
    """An adapted layer is affine in its input: the tangent at x along v is f(x + v) − f(x)."""
    for cell, module, x in cells:
        v = torch.randn_like(x)
        with torch.no_grad():
            expected = module(x + v) - module(x)  # the second call leaves what is remembered without gradients
        for gradients in (False, True, False):
            with torch.set_grad_enabled(gradients), fwad.dual_level():
                tangent = fwad.unpack_dual(module(fwad.make_dual(x, v))).tangent
            assert tangent is not None, cell
            agree(tangent, expected, torch.float64, cell, module(x))


# what torch itself does at its first use of forward-mode AD
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_differentiates_the_parameters(cells: Iterator[tuple[str, nn.Module, Tensor]]) -> None:
    """<u, J·v> of forward mode is <Jᵀ·u, v> of backward."""
    for cell, module, x in cells:
        values = trained(module)
        along = {name: 0.1 * torch.randn_like(p) for name, p in values.items()}
        y = module(x)
        u = torch.randn_like(y)
        backward = torch.autograd.grad(y, [dict(module.named_parameters())[name] for name in along], u)
        expected = sum((g * v).sum() for g, v in zip(backward, along.values(), strict=True))
        with torch.no_grad():
            module(x), module(x)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients), fwad.dual_level():
                duals = {name: fwad.make_dual(p, along[name]) for name, p in values.items()}
                tangent = fwad.unpack_dual(functional_call(module, duals, (x,))).tangent
            assert tangent is not None, cell
            agree((u * tangent).sum(), expected, torch.float64, cell, u.norm() * tangent.norm())


def test_functional_gradients_and_batches(cells: Iterator[tuple[str, nn.Module, Tensor]]) -> None:
    """torch.func.grad, a batch of gradients through one graph, and vmap over inputs."""
    for cell, module, x in cells:
        parameters = pk.adapter_parameters(module)
        expected = torch.autograd.grad(module(x).square().sum(), parameters)
        found = torch.func.grad(lambda p, m=module, x=x: functional_call(m, p, (x,)).square().sum())(trained(module))
        for one, other in zip(found.values(), expected, strict=True):
            agree(one, other, torch.float64, cell, *expected)
        upstream = torch.randn(3, *module(x).shape, dtype=x.dtype)
        batch = torch.autograd.grad(module(x), parameters, upstream, is_grads_batched=True)
        for i, u in enumerate(upstream):
            for one, other in zip(batch, torch.autograd.grad(module(x), parameters, u), strict=True):
                agree(one[i], other, torch.float64, cell, other, *expected)
        together = torch.func.vmap(module)(torch.stack([x, 2 * x]))
        agree(together, torch.stack([module(x), module(2 * x)]), torch.float64, cell)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_follows_the_parameters(cells: Iterator[tuple[str, nn.Module, Tensor]]) -> None:
    """What was remembered before the trace is no constant of it."""
    for cell, module, x in cells:
        module.eval()
        module(x), module(x)
        traced = torch.jit.trace(module, (x,), check_trace=False)
        for parameter in pk.adapter_parameters(module):
            parameter.data.add_(0.01)
        agree(traced(x), module(x), torch.float64, cell)


# what torch.compile itself does to trace an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("adapter, layer", [*_compiled()])
def test_a_layer_compiles_in_one_graph(adapter: str, layer: str) -> None:
    """torch.compile(fullgraph=True), with the route left to choose; the same numbers and gradients."""
    if layer == "transposed2d" and torch.__version__ < "2.5":
        pytest.skip("torch.compile of 2.4 cannot guard the default arguments of a forward reached through super()")
    try:
        module, x = wrapped(adapter, layer)
    except REFUSALS as refusal:
        pytest.skip(str(refusal))
    torch._dynamo.reset()
    results = []
    for function in (module, torch.compile(module, fullgraph=True, backend="eager")):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), pk.adapter_parameters(module))))
    for one, other in zip(*results, strict=True):
        agree(one, other, torch.float64, "compiled", *results[1])
