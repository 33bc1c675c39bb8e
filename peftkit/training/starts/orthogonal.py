"""Orthogonal factors: both have values at the start, and their product is 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from peftkit.errors import OptionError
from peftkit.training.starts.protocol import Factors, Seen, Start


@dataclass(frozen=True)
class Orthogonal(Start):
    """Draws A₀ from the even rows of a random rotation (r, r) and B₀ from the odd ones: B₀·A₀ = 0, r is even.

    B₀ = N·Q_odd/10 and A₀ = Q_evenᵀ·M/10 with N (m, r/2) and M (r/2, n) from N(0, 1): both factors have gradients from
    the first step (https://datta0.github.io/posts/rethink-lora-init/, as in PEFT). It is for `anchored` with
    start="given".
    """

    name: ClassVar[str] = "orthogonal"
    gives: ClassVar[frozenset[str]] = frozenset({"factors"})

    def factors(self, seen: Seen) -> Factors:
        (rows, columns), r = seen.weight.shape, seen.rank
        if r % 2:
            raise OptionError(f"{seen.site or 'the model'}: rank={r} was given, and orthogonal needs an even one")

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=seen.draws, dtype=torch.float32)

        Q = torch.linalg.qr(normal(r, r))[0]
        return Factors(normal(rows, r // 2) @ Q[1::2] / 10, Q[::2].mT @ normal(r // 2, columns) / 10)
