"""The operators on the device of this machine against float64: a GPU's kernels, and without a GPU their references.

On a GPU every test forces the kernels, so that what they cannot run is an error. `make gpu` runs this file.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit import kernels
from peftkit.kernels import operators
from tests.support.numbers import close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: rows, columns, rank: single numbers, primes, whole tiles, ragged edges, and many programs at once
SHAPES = [(1, 1, 1), (7, 5, 3), (64, 128, 16), (65, 131, 20), (1000, 1411, 32)]

#: relative to float64: sums over 1411 numbers in fp32, and to store a number costs half an ulp
SUMS = 1e-5
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}


@pytest.fixture(autouse=True)
def _only_the_kernels() -> Iterator[None]:
    with kernels.use("triton" if DEVICE == "cuda" else "auto"):
        yield


def drawn(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    """Normal numbers in a window of a canvas of NaN, whose rows are therefore apart."""
    canvas = torch.full([size + 10 for size in shape], float("nan"), dtype=dtype, device=DEVICE)
    window = canvas[tuple(slice(5, -5) for _ in shape)]
    return window.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def inputs(dtype: torch.dtype, m: int, n: int, r: int) -> tuple[Tensor, list[Tensor]]:
    """A matrix (m, n), and B1, A1, B2, A2."""
    W, *factors = (drawn(dtype, *s, seed=i) for i, s in enumerate(((m, n), (m, r), (r, n), (m, r), (r, n))))
    return W, factors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 200, 128)], ids=str)
def test_hadamard_and_moments(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    base, factors = inputs(dtype, *shape)
    B1, A1, B2, A2 = (factor.double() for factor in factors)
    full = (B1 @ A1) * (B2 @ A2)
    close(operators.hadamard(None, factors, 1.0), full, SUMS + ROUNDING[dtype])
    merged = operators.hadamard(base, factors, -0.3)
    close(merged, base.double() - 0.3 * full, SUMS + ROUNDING[dtype])
    assert (merged.dtype, merged.device.type) == (dtype, DEVICE)
    inner, square = operators.hadamard_moments(base, factors)
    close(square, full.square().sum(1), SUMS)
    assert ((inner - (full * base).sum(1)).norm() <= SUMS * full.norm() * base.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    base, factors = inputs(dtype, *shape)
    upstream = drawn(dtype, *shape[:2], seed=9)
    leaves = [tensor.requires_grad_() for tensor in (base, *factors)]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out = operators.differentiable_hadamard(leaves[0], leaves[1:], 0.7)
    expected = wide[0] + 0.7 * (wide[1] @ wide[2]) * (wide[3] @ wide[4])
    close(out, expected, SUMS + ROUNDING[dtype])
    gradients = torch.autograd.grad(out, leaves, upstream)
    for value, right in zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert value.dtype == dtype
        close(value, right, SUMS + 2 * ROUNDING[dtype])  # the operand of the second product is rounded too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_repeats(dtype: torch.dtype) -> None:
    base, factors = inputs(dtype, 700, 900, 24)
    runs = []
    for _ in range(3):
        torch.randn(1 << 20, device=DEVICE).square()  # other work, and other memory to be given
        results = [operators.hadamard(base, factors, 0.3), operators.hadamard_moments(base, factors)]
        runs.append(results + operators.hadamard_backward(base, factors, 0.3))
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_operators_keep_the_rules_of_operators() -> None:
    base, factors = inputs(torch.float32, 7, 5, 3)
    torch.library.opcheck(operators.hadamard, (base, factors, 0.3))
    torch.library.opcheck(operators.hadamard, (None, factors, 1.0))
    torch.library.opcheck(operators.hadamard_moments, (base, factors))
    torch.library.opcheck(operators.hadamard_backward, (base, [f.contiguous() for f in factors], 0.3))


# what torch.compile itself does to trace an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_gives_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Linear(96, 64, device=DEVICE)
    pk.wrap(model, "loha", rank=3, route="dense")
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    x, results = torch.randn(5, 96, device=DEVICE), []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), pk.adapter_parameters(model))))
    for one, other in zip(*results, strict=True):
        close(one, other, 1e-5)


def test_merging_and_restoring_on_the_device() -> None:
    torch.manual_seed(0)
    model = nn.Linear(96, 64, device=DEVICE, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    pk.wrap(model, "loha", rank=3)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(5, 96, device=DEVICE, dtype=torch.bfloat16)
    expected = model(x)
    pk.merge(model)
    assert not torch.equal(model.weight, before)
    close(model(x), expected, 2e-2)
    pk.restore(model)
    assert torch.equal(model.weight, before)
