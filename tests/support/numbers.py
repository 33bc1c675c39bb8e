"""Bounds on numbers."""

from __future__ import annotations

from torch import Tensor


def close(ours: Tensor, theirs: Tensor, bound: float, what: str = "", *terms: Tensor) -> None:
    """‖ours − theirs‖ ≤ bound·(‖theirs‖ + Σ ‖term‖), the terms being what both are sums of."""
    error = (ours.double() - theirs.double()).norm()
    size = sum(t.double().norm() for t in (theirs, *terms))
    assert error <= bound * size, f"{what}: relative error {error / size:.2e} above {bound:.0e}"
