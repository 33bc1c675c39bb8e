"""The kernels in Triton's interpreter, through the operators that launch them. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from peftkit import kernels
from peftkit.kernels import choosing, ops
from tests.kernels.bfloat16 import repair

repair()
SHAPES = [(1, 1, 1), (7, 5, 3), (64, 64, 16), (100, 31, 4), (65, 129, 40)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: relative errors: of one rounding to the dtype, of sums of products of rounded numbers, and of sums in fp32
ROUNDING = {torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
PAD = 40


def canvas(tensor: Tensor) -> Tensor:
    """The same numbers as a window in a sea of NaN."""
    if tensor.dim() != 2:
        return tensor
    sea = torch.full((tensor.shape[0] + 2 * PAD, tensor.shape[1] + 2 * PAD), float("nan"), dtype=tensor.dtype)
    window = sea[PAD:-PAD, PAD:-PAD]
    window.copy_(tensor)
    return window


def drawn(structure: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Factors of a structure and a weight, in windows."""
    M, N, R = shape
    torch.manual_seed(M + N + R)
    sizes = {
        "lowrank": [(M, R), (R, N)],
        "hadamard": [(M, R), (R, N), (M, R), (R, N)],
        "kron": [(3, 2), (M, N)],
        "rotation": [(3, R, R), (3 * R, N)],
    }[structure]
    factors = [canvas(torch.randn(size).to(dtype)) for size in sizes]
    rows, columns = ops.structure_of(structure, factors).shape
    return factors, canvas(torch.randn(rows, columns).to(dtype))


def close(ours: Tensor, exact: Tensor, bound: float, scale: float | None = None) -> None:
    error = (ours.double() - exact).norm() / (exact.norm() if scale is None else scale)
    assert error <= bound, f"relative error {error:.1e}"


@pytest.fixture(autouse=True)
def _triton() -> object:
    with kernels.use("triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("structure", list(ops.STRUCTURES))
def test_delta_and_moments(structure: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against float64, on windows of which nothing outside may be read."""
    factors, W = drawn(structure, shape, dtype)
    exact = ops.STRUCTURES[structure](*(f.double() for f in factors)).dense()
    row = torch.rand(len(W))
    close(ops.delta(None, factors, structure, 1.0, None), exact, ROUNDING[dtype])
    close(ops.delta(W, factors, structure, 0.37, None), W.double() + 0.37 * exact, ROUNDING[dtype])
    scaled = row.double()[:, None] * (W.double() + 0.37 * exact)
    close(ops.delta(W, factors, structure, 0.37, row), scaled, ROUNDING[dtype])
    products, squares = ops.moments(W, factors, structure).double()
    size = float(exact.norm() * W.double().norm())
    close(products, (exact * W.double()).sum(1), ROUNDING[torch.float32], size)
    close(squares, exact.square().sum(1), 2 * ROUNDING[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hadamard_backward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    factors, G = drawn("hadamard", shape, dtype)
    exact = [f.double().requires_grad_() for f in factors]
    product = (exact[0] @ exact[1]) * (exact[2] @ exact[3])
    for ours, right in zip(
        ops.hadamard_backward(G, factors), torch.autograd.grad(product, exact, G.double()), strict=True
    ):
        close(ours, right, 2 * ROUNDING[dtype])


def test_every_result_repeats_bit_for_bit() -> None:
    factors, W = drawn("hadamard", (90, 300, 8), torch.float32)
    for call in (
        lambda: [ops.delta(W, factors, "hadamard", 1.0, None)],
        lambda: [ops.moments(W, factors, "hadamard")],
        lambda: ops.hadamard_backward(W, factors),
    ):
        assert all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows 700 000 elements apart: the last lie 2.2e9 from the first; what is between is never touched."""
    rows, apart = 3200, 700_000
    W = torch.empty(rows * apart, dtype=torch.bfloat16).as_strided((rows, 8), (apart, 1))
    W.normal_()
    B, A = torch.randn(rows, 2).bfloat16(), torch.randn(2, 8).bfloat16()
    merged = ops.delta(W, [B, A], "lowrank", 1.0, None)
    close(merged[-64:], (W.double() + B.double() @ A.double())[-64:], ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("structure", list(ops.STRUCTURES))
def test_the_operators_are_what_their_schemas_say(structure: str) -> None:
    factors, W = drawn(structure, (7, 5, 3), torch.float32)
    opcheck(ops.delta, (W, factors, structure, 0.5, None))
    opcheck(ops.delta, (None, factors, structure, 0.5, torch.rand(len(W))))
    opcheck(ops.moments, (W, factors, structure))
    if structure == "hadamard":
        opcheck(ops.hadamard_backward, (W, factors))


def test_a_kernel_that_fails_is_replaced_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.kernels.triton import launch

    def broken(*arguments: object) -> Tensor:
        raise RuntimeError("out of registers")

    factors, W = drawn("hadamard", (7, 5, 3), torch.float32)
    with kernels.use("torch"):
        expected = ops.delta(W, factors, "hadamard", 0.5, None)
    monkeypatch.setattr(launch, "delta", broken)
    monkeypatch.setattr(choosing, "_failed", set())
    with pytest.raises(RuntimeError, match="out of registers"):
        ops.delta(W, factors, "hadamard", 0.5, None)
    with kernels.use("auto"), caplog.at_level(logging.WARNING, "peftkit.kernels"):
        for _ in range(3):
            assert torch.equal(ops.delta(W, factors, "hadamard", 0.5, None), expected)
    assert len(caplog.records) == 1
    assert "out of registers" in caplog.text


def test_torch_pins_and_large_ranks_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.kernels.triton import launch

    def never(*arguments: object) -> Tensor:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(launch, "delta", never)
    factors, W = drawn("hadamard", (7, 5, 3), torch.float32)
    with kernels.use("torch"):
        ops.delta(W, factors, "hadamard", 0.5, None)
    wide, W = drawn("lowrank", (7, 5, 129), torch.float32)
    ops.delta(W, wide, "lowrank", 0.5, None)
    double = [factor.double() for factor in factors]
    ops.delta(None, double, "hadamard", 0.5, None)
