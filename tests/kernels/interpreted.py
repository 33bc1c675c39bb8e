"""The kernels against float64 in Triton's interpreter, in the process that test_kernels.py starts for them.

The interpreter holds bfloat16 as the bits of a uint16, which it multiplies as integers and truncates where a GPU
rounds. `_Bfloat16` makes both right, and any other arithmetic on such bits an error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from peftkit import kernels
from peftkit.errors import OptionError
from peftkit.kernels import operators
from peftkit.kernels.triton import launch
from tests.support.numbers import close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

#: relative to float64: sums are fp32, and to store a number costs half an ulp
SUMS = 1e-6
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}

#: rows, columns, rank: single numbers, primes, whole tiles, and several of them with ragged edges
SHAPES = [(1, 1, 1), (7, 5, 3), (64, 128, 16), (65, 131, 40)]


class _Bfloat16:
    dot = InterpreterBuilder.create_dot
    cast = InterpreterBuilder.cast_impl
    binary = InterpreterBuilder.binary_op

    @staticmethod
    def floats(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
        return _Bfloat16.dot(self, _Bfloat16.floats(a), _Bfloat16.floats(b), *others)

    def cast_impl(self: Any, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return _Bfloat16.cast(self, _Bfloat16.floats(source), dtype)

    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        assert tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar), "arithmetic on bfloat16 that is not fp32"
        return _Bfloat16.binary(self, left, right, op)


@pytest.fixture(autouse=True)
def _right_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("create_dot", "cast_impl", "binary_op"):
        monkeypatch.setattr(InterpreterBuilder, name, getattr(_Bfloat16, name))


@pytest.fixture(autouse=True)
def _only_the_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test is of the kernels, unless it says otherwise: what they cannot run is an error."""
    with kernels.use("auto" if "falls_back" in request.node.name else "triton"):
        yield


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that the launches ask for lies between numbers that must still be there at the end."""
    plain, buffers = torch.empty, []

    def empty(*size: Any, **options: Any) -> Tensor:
        if sys._getframe(1).f_globals["__name__"] != launch.__name__:
            return plain(*size, **options)
        whole = torch.full((torch.empty(*size, device="meta").numel() + 256,), 7.0, **options)
        buffers.append(whole)
        return whole[128:-128].view(*size).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", empty)
    yield
    assert all((edge == 7).all() for whole in buffers for edge in (whole[:128], whole[-128:]))


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in a window of a canvas of NaN, whose rows are therefore apart."""
    generator = torch.Generator().manual_seed(hash((*shape, seed)) % 2**31)
    canvas = torch.full([size + 10 for size in shape], float("nan"), dtype=dtype)
    window = canvas[tuple(slice(5, -5) for _ in shape)]
    return window.copy_(torch.randn(shape, generator=generator))


def hadamard(dtype: torch.dtype, m: int, n: int, r: int) -> list[Tensor]:
    """B1, A1, B2, A2."""
    return [drawn(dtype, *s, seed=i) for i, s in enumerate(((m, r), (r, n), (m, r), (r, n)))]


def exact(factors: list[Tensor]) -> Tensor:
    """(B1·A1) ⊙ (B2·A2) in float64."""
    B1, A1, B2, A2 = (factor.double() for factor in factors)
    return (B1 @ A1) * (B2 @ A2)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hadamard_and_moments(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    factors = hadamard(dtype, *shape)
    full, base = exact(factors), drawn(dtype, *shape[:2], seed=9)
    close(operators.hadamard(None, factors, 1.0), full, SUMS + ROUNDING[dtype])
    merged = operators.hadamard(base, factors, -0.3)
    close(merged, base.double() - 0.3 * full, SUMS + ROUNDING[dtype])
    assert merged.dtype == dtype
    inner, square = operators.hadamard_moments(base, factors)
    close(square, full.square().sum(1), SUMS)
    assert ((inner - (full * base).sum(1)).norm() <= SUMS * full.norm() * base.double().norm()).item()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:3], (65, 131, 20)], ids=str)
def test_forward_and_backward_of_hadamard(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    factors = [factor.requires_grad_() for factor in hadamard(dtype, *shape)]
    base, upstream = drawn(dtype, *shape[:2], seed=8).requires_grad_(), drawn(dtype, *shape[:2], seed=9)
    wide = [tensor.detach().double().requires_grad_() for tensor in (base, *factors)]
    expected = wide[0] + 0.7 * (wide[1] @ wide[2]) * (wide[3] @ wide[4])
    out = operators.differentiable_hadamard(base, factors, 0.7)
    close(out, expected, SUMS + ROUNDING[dtype])
    for value, gradient in zip(
        torch.autograd.grad(out, (base, *factors), upstream),
        torch.autograd.grad(expected, wide, upstream.double()),
        strict=True,
    ):
        assert value.dtype == dtype
        close(value, gradient, SUMS + 2 * ROUNDING[dtype])  # the operand of the second product is rounded too


def test_every_bit_repeats() -> None:
    factors = hadamard(torch.bfloat16, 70, 200, 20)
    base = drawn(torch.bfloat16, 70, 200)
    runs = [
        [
            operators.hadamard(base, factors, 0.3),
            operators.hadamard_moments(base, factors),
            *operators.hadamard_backward(base, factors, 0.3),
        ]
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """130 rows 2²⁴ − 1 numbers apart, the most that is taken, end behind 2³¹; only what is touched takes memory."""
    stride, (m, n) = (1 << 24) - 1, (130, 40)
    base = torch.empty(m * stride, dtype=torch.bfloat16).as_strided((m, n), (stride, 1))
    base.copy_(drawn(torch.bfloat16, m, n))
    assert (m - 1) * stride > 1 << 31
    factors = hadamard(torch.bfloat16, m, n, 4)
    near = base.clone(memory_format=torch.contiguous_format)
    for operator, others in ((operators.hadamard, (0.3,)), (operators.hadamard_moments, ())):
        assert torch.equal(operator(base, factors, *others), operator(near, factors, *others))
    far, close_by = (operators.hadamard_backward(M, factors, 0.3) for M in (base, near))
    assert all(torch.equal(one, other) for one, other in zip(far, close_by, strict=True))


def test_operators_keep_the_rules_of_operators() -> None:
    factors = hadamard(torch.bfloat16, 7, 5, 3)
    base = drawn(torch.float32, 7, 5)
    torch.library.opcheck(operators.hadamard, (base, factors, 0.3))
    torch.library.opcheck(operators.hadamard, (None, factors, 1.0))
    torch.library.opcheck(operators.hadamard_moments, (base, factors))
    B1, A1, B2, A2 = (factor.contiguous() for factor in factors)
    torch.library.opcheck(operators.hadamard_backward, (base, [B1, A1, B2, A2], 0.3))
    torch.library.opcheck(operators.hadamard_backward, (base.mT, [A1.mT, B1.mT, A2.mT, B2.mT], 0.3))


# what torch.compile itself does to trace an autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_graph_runs_the_kernels(launches: list[str]) -> None:
    factors = [factor.requires_grad_() for factor in hadamard(torch.float32, 7, 5, 3)]

    def twice(*factors: Tensor) -> Tensor:
        return 2 * operators.differentiable_hadamard(None, factors, 0.3)

    results = []
    for function in (twice, torch.compile(twice, fullgraph=True, backend="aot_eager")):
        launches.clear()
        out = function(*factors)
        results.append((out, *torch.autograd.grad(out.sum(), factors)))
        assert launches == ["hadamard", "hadamard_backward"]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was launched."""
    names: list[str] = []
    for name in ("hadamard", "hadamard_moments", "hadamard_backward"):
        original = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, n=name, f=original: (names.append(n), f(*a))[1])
    return names


def test_torch_pins_and_blocks_nest(launches: list[str]) -> None:
    factors = hadamard(torch.float32, 7, 5, 3)
    with kernels.use("torch"):
        pinned = operators.hadamard(None, factors, 1.0)
        with kernels.use("auto"):
            operators.hadamard(None, factors, 1.0)
        assert launches == ["hadamard"]
        with pytest.raises(ZeroDivisionError), kernels.use("auto"):
            raise ZeroDivisionError
        operators.hadamard(None, factors, 1.0)
        assert launches == ["hadamard"]
    close(pinned, exact(factors), SUMS)


def test_what_fails_falls_back_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One line, an equal result, and no second try; who asked for Triton and nothing else is told."""
    factors = hadamard(torch.float32, 7, 5, 3)
    tries = []

    def broken(*arguments: Any) -> Tensor:
        tries.append(arguments)
        raise RuntimeError("no such instruction\nptxas said more")

    monkeypatch.setattr(operators, "_failed", {})
    monkeypatch.setattr(launch, "hadamard", broken)
    with kernels.use("triton"), pytest.raises(RuntimeError, match="no such instruction"):
        operators.hadamard(None, factors, 1.0)
    with caplog.at_level(logging.WARNING, logger="peftkit.kernels"):
        results = [operators.hadamard(None, factors, 1.0) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "hadamard runs in plain PyTorch from now on: its kernel failed before: RuntimeError: no such instruction"
    ]
    assert len(tries) == 2
    for result in results:
        close(result, exact(factors), SUMS)
    with kernels.use("triton"), pytest.raises(OptionError, match="its kernel failed before"):
        operators.hadamard(None, factors, 1.0)


REFUSED: dict[str, Callable[[], Any]] = {
    "float64": lambda: operators.hadamard(None, hadamard(torch.float64, 3, 4, 2), 1.0),
    "rank 129": lambda: operators.hadamard(None, hadamard(torch.float32, 3, 4, 129), 1.0),
    "rank 33": lambda: operators.hadamard_backward(torch.ones(3, 4), hadamard(torch.float32, 3, 4, 33), 1.0),
    "different dtypes": lambda: operators.hadamard(
        None, [*hadamard(torch.float16, 3, 4, 2)[:2], *hadamard(torch.float32, 3, 4, 2)[2:]], 1.0
    ),
    "a stride of 2²⁴": lambda: operators.hadamard_moments(
        torch.ones(1 << 24).as_strided((1, 4), (1 << 24, 1)), hadamard(torch.float32, 1, 4, 2)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_a_kernel_does_not_take_falls_back(reason: str, launches: list[str]) -> None:
    result = REFUSED[reason]()
    assert not launches
    assert all(torch.isfinite(tensor).all() for tensor in (result if isinstance(result, list) else [result]))
    with kernels.use("triton"), pytest.raises(OptionError, match=reason):
        REFUSED[reason]()
