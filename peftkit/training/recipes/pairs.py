"""Rules for the gradients of the two factors B and A of adapters whose ΔW is their product."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.adapters.pair import Pair
from peftkit.training.recipes.recipe import Recipe


class Factors(NamedTuple):
    """B (m, r), A (r, n) and γ of γ·B·A, in fp64 where the device has it."""

    B: Tensor
    A: Tensor
    scale: float


class PairRecipe(Recipe):
    """A rule that gives two factors other gradients before a step."""

    wanted: ClassVar[str] = "two factors that train, as lora has"

    def takes(self, adapter: Adapter) -> bool:
        pair = adapter.pair()
        return pair is not None and pair.scale != 0 and pair.both_train

    def before_step(self, optimizer: Optimizer) -> None:
        del optimizer
        for place, part in self.parts.items():
            pair = part.adapter.pair()
            if pair is not None and pair.up.grad is not None and pair.down.grad is not None:
                kind = wide(pair.up)
                gB, gA = self.gradients(place, factors(pair), pair.up.grad.to(kind), pair.down.grad.to(kind))
                pair.up.grad.copy_(gB)
                pair.down.grad.copy_(gA)

    @abstractmethod
    def gradients(self, place: str, own: Factors, gB: Tensor, gA: Tensor) -> tuple[Tensor, Tensor]:
        """Return what B (m, r) and A (r, n) have as gradients in place of gB and gA."""


def wide(tensor: Tensor) -> torch.dtype:
    """Return the widest floating point of a tensor's device."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def factors(pair: Pair) -> Factors:
    """Return the factors as they are now, in the widest floating point."""
    B, A = pair.factors()
    return Factors(B.to(wide(B)), A.to(wide(A)), pair.scale)


def least(eigenvalues: Tensor) -> Tensor:
    """Return what an eigenvalue of a Gram matrix must be above for its direction to count."""
    return 1e-12 * eigenvalues.abs().max()


def pseudo_inverse(eigenvalues: Tensor, vectors: Tensor) -> Tensor:
    """Return the pseudo-inverse (r, r) of a Gram matrix, from its eigenvalues (r,) and eigenvectors (r, r)."""
    kept = eigenvalues > least(eigenvalues)
    return (vectors * torch.where(kept, 1 / torch.where(kept, eigenvalues, 1.0), 0.0)) @ vectors.mT
