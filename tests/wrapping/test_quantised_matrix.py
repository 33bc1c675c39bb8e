"""The tensor that stands for a quantised W gives what the dequantised W gives, and keeps no copy of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.wrapping.bases.base import Base
from peftkit.wrapping.bases.formats import format_of
from peftkit.wrapping.bases.matrix import QuantisedMatrix


class Halves(Base):
    """A format for tests: integers, of which one is a half."""

    title = "halves"

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.read: list[int] = []

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return False

    @classmethod
    def of(cls, module: nn.Module) -> Base:
        raise NotImplementedError

    @classmethod
    def requantised(cls, module: nn.Module, W: Tensor) -> dict[str, object]:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        return self.numbers.shape[0], self.numbers.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.numbers,)

    def rows(self, start: int, stop: int) -> Tensor:
        self.read.append(stop - start)
        return self.numbers[start:stop].float() / 2


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Halves:
    monkeypatch.setattr("peftkit.wrapping.bases.matrix.BLOCK", 64)
    monkeypatch.setattr("peftkit.wrapping.bases.matrix.block_size", lambda _: 64)
    return Halves(torch.randint(-9, 9, (48, 32), dtype=torch.int8))


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "W @ b": lambda W, n, m: W @ n.mT,
    "Wᵀ @ a": lambda W, n, m: W.mT @ m.mT,
    "a @ W": lambda W, n, m: m @ W,
    "b @ Wᵀ": lambda W, n, m: n @ W.mT,
    "linear": lambda W, n, m: F.linear(n, W),
    "linear with a bias": lambda W, n, m: F.linear(n, W, m[0]),
    "linear of three dimensions": lambda W, n, m: F.linear(n.view(2, -1, n.shape[1]), W),
    "cast": lambda W, n, m: F.linear(n.double(), W.to(torch.float64)).float(),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_and_their_gradients_go_by_blocks(base: Halves, product: str) -> None:
    results = []
    for W in (QuantisedMatrix(base), base.numbers.float() / 2):
        torch.manual_seed(0)
        n, m = torch.randn(6, 32, requires_grad=True), torch.randn(6, 48, requires_grad=True)
        y = PRODUCTS[product](W, n, m)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in (n, m) if t.grad is not None)])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-4)
    assert max(base.read) == 8  # of 48 rows: 4 blocks of 64 numbers


def test_16_bits_are_summed_in_32(base: Halves) -> None:
    a = torch.randn(3, 48).bfloat16()
    got = a @ QuantisedMatrix(base, torch.bfloat16)
    exact = a.float() @ (base.numbers.float() / 2).bfloat16().float()
    assert got.dtype == torch.bfloat16
    assert float((got.float() - exact).norm()) <= 2**-8 * float(exact.norm())


def test_autograd_keeps_the_stored_numbers(base: Halves) -> None:
    kept: list[Tensor] = []
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.linear(x, QuantisedMatrix(base))
    assert any(isinstance(t, QuantisedMatrix) for t in kept)
    assert not any(t.numel() == base.numbers.numel() for t in kept if not isinstance(t, QuantisedMatrix))


def test_what_it_has_no_way_of_its_own_for_is_that_of_the_whole(base: Halves) -> None:
    W, M = base.numbers.float() / 2, QuantisedMatrix(base)
    assert torch.equal(M.abs().sum(0), W.abs().sum(0))
    assert torch.equal(M.reshape(-1), W.reshape(-1))
    assert torch.equal(M + M, W + W)
    assert torch.equal(M[base.numbers > 0], W[base.numbers > 0])
    assert torch.equal(torch.empty(48, 32).copy_(M), W)
    assert torch.equal(M @ M.mT, W @ W.mT)
    assert (M.shape, M.mT.shape, M.dtype, M.device.type) == (W.shape, W.mT.shape, torch.float32, "cpu")
    assert "halves" in repr(M)


def test_a_plain_layer_has_no_format() -> None:
    assert format_of(nn.Linear(2, 2)) is None
