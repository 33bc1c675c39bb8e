"""Resizing an adapter file: the best approximation of its rank, and the error that is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peftkit as pk
from peftkit.delta.truncation import Keep, nearest, nearest_kronecker, truncate
from tests.support.adapter_files import matrices, optimum, source, truth
from tests.support.files import load
from tests.support.models import accepting

KEEPS: list[dict[str, Any]] = [{"rank": 1}, {"rank": 3}, {"energy": 0.6}, {"energy": 0.95}, {"threshold": 0.5}]


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("case", ["lora", "lora tucker", "loha", "lokr", "lokr rank", "loldu", "full"])
def test_resizing_is_the_best_truncation(case: str, keep: dict[str, Any], tmp_path: Path) -> None:
    path, out = source(tmp_path, case), tmp_path / "out.safetensors"
    report = {m.name: m for m in pk.resize(path, out, **keep).modules}
    before, after = truth(case), matrices(out)
    for name, X in before.items():
        values = torch.linalg.svdvals(X)
        shares = values.square().cumsum(0) / values.square().sum()
        if "rank" in keep:
            k = min(keep["rank"], len(values))
        elif "energy" in keep:
            k = int((shares < keep["energy"]).sum()) + 1
        else:
            k = int((values >= keep["threshold"] * values[0]).sum())
        assert report[name].after == f"lora {k}" or "rank" in keep, name
        error = float((after[name] - X).norm() / X.norm())
        assert error == pytest.approx(optimum(X, k), rel=1e-4, abs=2e-6), name
        assert torch.linalg.matrix_rank(after[name], rtol=1e-5) <= k


def test_truncated_factors_are_balanced(tmp_path: Path) -> None:
    """Alike in size column by row, which is what fp16 holds best and training wants."""
    path, out = source(tmp_path, "loha"), tmp_path / "out.safetensors"
    pk.resize(path, out, rank=2)
    tensors = load(out)
    for name in accepting("loha"):
        up, down = tensors[f"{name}.up"].norm(dim=0), tensors[f"{name}.down"].norm(dim=1)
        torch.testing.assert_close(up, down, rtol=1e-4, atol=1e-6)


SPECTRA: dict[str, Callable[[int, float], Tensor]] = {
    "flat": lambda n, a: torch.ones(n),
    "power": lambda n, a: torch.arange(1, n + 1) ** (-2 * a),
    "exponential": lambda n, a: torch.exp(-a * torch.arange(n)),
    "noisy low rank": lambda n, a: torch.cat([torch.full((6,), 10.0), torch.full((n - 6,), a)]),
    "step": lambda n, a: torch.cat([torch.full((n // 2,), 1.0), torch.full((n - n // 2,), 1e-3 * a)]),
    "low rank": lambda n, a: torch.cat([torch.ones(5), torch.zeros(n - 5)]),
}


def with_spectrum(values: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    U = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64))[0]
    return (U * values.double()) @ V.mT


@given(
    spectrum=st.sampled_from(list(SPECTRA)),
    decay=st.floats(0.05, 1.0),
    rank=st.integers(1, 12),
    sizes=st.tuples(st.integers(20, 140), st.integers(20, 140)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_the_nearest_matrix_of_a_rank_is_within_2_percent_of_the_optimum(
    spectrum: str, decay: float, rank: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    values = SPECTRA[spectrum](min(sizes), decay).double()
    X = with_spectrum(values, *sizes, seed).to(dtype)
    found, lost = nearest(X, Keep(rank=rank), seed=seed)
    best = float(values[rank:].norm() / values.norm())
    true = float((found.B.double() @ found.A.double() - X.double()).norm() / X.double().norm())
    rounding = 2e-6 if dtype == torch.float32 else 1e-13
    assert found.rank <= rank
    assert true <= 1.02 * best + rounding
    assert lost == pytest.approx(true, rel=1e-2, abs=max(rounding, 1e-7)), "what is reported is not the truth"


@given(
    spectrum=st.sampled_from(["power", "exponential", "noisy low rank", "flat"]),
    decay=st.floats(0.05, 1.0),
    share=st.floats(0.3, 0.999),
    threshold=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_ranks_kept_are_the_fewest_that_do(
    spectrum: str, decay: float, share: float, threshold: bool, seed: int
) -> None:
    values = SPECTRA[spectrum](120, decay).double()
    X = with_spectrum(values, 150, 120, seed)
    keep = Keep(threshold=share) if threshold else Keep(energy=share)
    found, _ = nearest(X, keep, seed=seed)
    if threshold:
        sure = (int((values >= t * values[0]).sum()) for t in (share * 1.02, share * 0.98))
    else:
        shares = values.square().cumsum(0) / values.square().sum()
        sure = (int((shares < t).sum()) + 1 for t in (share * (1 - 1e-3), share + 1e-3 * (1 - share)))
    fewest, most = sure
    assert fewest <= found.rank <= max(most, 1) + 1


@given(rank=st.integers(1, 9), keep=st.integers(1, 9), scale=st.floats(-4, 4), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_truncating_factors_is_truncating_their_product(rank: int, keep: int, scale: float, seed: int) -> None:
    from peftkit.delta import LowRank

    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(20, rank, generator=generator, dtype=torch.float64) * 10**scale
    A = torch.randn(rank, 14, generator=generator, dtype=torch.float64)
    found, lost = truncate(LowRank(B, A), Keep(rank=keep))
    X = B @ A
    true = float((found.dense() - X).norm() / X.norm())
    assert true == pytest.approx(optimum(X, keep), rel=1e-6, abs=1e-12)
    assert lost == pytest.approx(true, rel=1e-6, abs=1e-7)


@given(
    outer=st.sampled_from([(2, 3), (1, 4), (6, 1), (4, 4), (3, 6)]),
    noise=st.sampled_from([0.0, 1e-3, 0.3, 3.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_nearest_kronecker_product_is_the_leading_pair_of_the_rearranged_matrix(
    outer: tuple[int, int], noise: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    (a, c), (m, n) = outer, (12, 12)
    X = torch.kron(random(a, c), random(m // a, n // c)) + noise * random(m, n)
    C, D, lost = nearest_kronecker(X, outer)
    R = torch.stack(
        [X[i * m // a : (i + 1) * m // a, j * n // c : (j + 1) * n // c].flatten() for i in range(a) for j in range(c)]
    )
    values = torch.linalg.svdvals(R)
    true = float((torch.kron(C, D) - X).norm() / X.norm())
    assert true == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-6, abs=1e-7)
    assert lost == pytest.approx(true, rel=1e-6, abs=1e-7)
