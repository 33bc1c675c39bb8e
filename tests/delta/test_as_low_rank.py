"""A ΔW written as one product, or as the adapter of its structure, is the same ΔW."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank, Rotation
from peftkit.delta.as_low_rank import as_low_rank, balanced, of_matrix, side_by_side
from peftkit.geometry import Shape


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def lowrank(m: int, n: int, r: int) -> LowRank:
    return LowRank(draw(m, r), draw(r, n))


#: a ΔW of every structure, and the rank of its product: small by structure, else that of the matrix
DELTAS: dict[str, tuple[Callable[[], Delta], int]] = {
    "lora": (lambda: lowrank(12, 8, 3), 3),
    "lora wider than its weight": (lambda: lowrank(12, 8, 9), 8),
    "loha": (lambda: Hadamard(draw(12, 2), draw(2, 8), draw(12, 2) + 1, draw(2, 8) - 1), 4),
    "loha of many ranks": (lambda: Hadamard(draw(12, 3), draw(3, 8), draw(12, 3) + 1, draw(3, 8) - 1), 8),
    "lokr, few columns of C": (lambda: Kron(draw(4, 2), draw(1, 4), draw(3, 1)), 2),
    "lokr, few rows of C": (lambda: Kron(draw(2, 4), draw(1, 4), draw(3, 1)), 2),
    "lokr, full block": (lambda: Kron(draw(1, 2), draw(12, 4)), 4),
    "lokr of many ranks": (lambda: Kron(draw(4, 4), draw(3, 2)), 8),
    "full": (lambda: Dense(draw(12, 8), 0.5), 8),
    "full, wide": (lambda: Dense(draw(6, 8)), 6),
    "rotation": (lambda: Rotation(draw(3, 4, 4), draw(12, 8)), 8),
}


@pytest.mark.parametrize("case", DELTAS)
def test_as_one_product_it_is_the_same_matrix(case: str) -> None:
    make, rank = DELTAS[case]
    low = as_low_rank(make())
    assert low.rank == rank
    torch.testing.assert_close(low.dense(), make().dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", DELTAS)
def test_the_adapter_of_its_structure_has_the_same_change(case: str) -> None:
    delta = DELTAS[case][0]()
    options, parameters = delta.as_parameters()
    W = draw(*delta.shape)
    adapter = registry.build(delta.structure or "full", Shape(*delta.shape), W, **options)
    missing = adapter.load_state_dict(parameters, strict=False)
    assert not missing.unexpected_keys and not {key for key, _ in adapter.named_parameters()} & set(
        missing.missing_keys
    )
    torch.testing.assert_close(adapter.eval()(W, 1.0).dense(), delta.dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_a_matrix_beside_the_smaller_identity(shape: tuple[int, int]) -> None:
    M = draw(*shape)
    assert of_matrix(M).rank == min(shape)
    assert torch.equal(of_matrix(M).dense(), M)


def test_layers_that_are_fused_are_stacked_row_block_under_row_block() -> None:
    one, two = lowrank(4, 6, 2), lowrank(2, 6, 1)
    fused = side_by_side([(one, 4, True), (None, 3, False), (two, 2, False)], 6)
    swapped = torch.cat([one.dense()[2:], one.dense()[:2]])
    expected = torch.cat([swapped, torch.zeros(3, 6), two.dense()])
    assert fused.rank == 3
    torch.testing.assert_close(fused.dense(), expected, rtol=1e-12, atol=1e-12)


def test_balanced_factors_have_equal_norms_and_dead_ranks_stay() -> None:
    low = LowRank(draw(6, 3) * 1e4, draw(3, 5) * 1e-4)
    low.B[:, 1] = 0
    even = balanced(low)
    torch.testing.assert_close(even.dense(), low.dense(), rtol=1e-12, atol=1e-12)
    norms = torch.linalg.vector_norm(even.B, dim=0), torch.linalg.vector_norm(even.A, dim=1)
    torch.testing.assert_close(norms[0][[0, 2]], norms[1][[0, 2]])
    assert torch.equal(even.A[1], low.A[1])
