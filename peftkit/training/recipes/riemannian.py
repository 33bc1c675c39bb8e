"""Riemannian preconditioning of the gradients of two factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftkit.errors import require_number
from peftkit.training.recipes.pairs import Factors, PairRecipe


class Riemannian(PairRecipe):
    """Riemannian preconditioning: each factor's gradient over the Gram matrix of the other one.

    g_A becomes (BᵀB + δI)⁻¹·g_A, and g_B becomes g_B·(AAᵀ + δI)⁻¹: the learning rate that suits does not depend on the
    sizes of the factors (https://arxiv.org/abs/2402.02347).

    Args:
        model: a wrapped model.
        delta: δ, 0.01 by default.
        name: of one adapter; by default all.

    Raises:
        OptionError: δ is not above 0, or no adapter has two factors that train.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
        >>> handle = pk.training.Riemannian(model).attach(optimizer)
    """

    def __init__(self, model: nn.Module, *, delta: float = 0.01, name: str | None = None) -> None:
        require_number("delta", delta, positive=True)
        super().__init__(model, name=name)
        self.delta = delta

    def gradients(self, place: str, own: Factors, gB: Tensor, gA: Tensor) -> tuple[Tensor, Tensor]:
        del place
        B, A, _ = own
        one = self.delta * torch.eye(len(A), dtype=A.dtype, device=A.device)
        return torch.linalg.solve(A @ A.mT + one, gB.mT).mT, torch.linalg.solve(B.mT @ B + one, gA)
