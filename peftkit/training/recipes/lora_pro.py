"""LoRA-Pro, the efficient form: two factors whose step together is the best one for the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit.training.recipes.pairs import Factors, PairRecipe, least, pseudo_inverse


class LoRAPro(PairRecipe):
    r"""LoRA-Pro, the efficient form: the step of both factors together is the best one for the whole weight.

    The gradients become those that minimise ‖s·(B·g_A + g_B·A) − G‖, of all pairs that do the nearest to the factors'
    own, where G is the gradient of the weight and s = γ: s·(B·g_A + g_B·A) is the projection of G on the tangent space.
    G itself is not needed (https://arxiv.org/abs/2407.18242, theorem 2.1). `LoRAProFull` keeps Adam's moments of the
    weight's gradient too.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        OptionError: no adapter has two factors that train.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        >>> handle = pk.training.LoRAPro(model).attach(optimizer)
    """

    def gradients(self, place: str, own: Factors, gB: Tensor, gA: Tensor) -> tuple[Tensor, Tensor]:
        del place
        return best_gradients(own, gB, gA)


def best_gradients(own: Factors, gB: Tensor, gA: Tensor) -> tuple[Tensor, Tensor]:
    """Return the g_B (m, r) and g_A (r, n) that move γ·B·A along the projection of G on the tangent space.

    Args:
        own: the factors.
        gB: (m, r) γ·G·Aᵀ.
        gA: (r, n) γ·Bᵀ·G.
    """
    B, A, scale = own
    p, P = torch.linalg.eigh(B.mT @ B)
    q, Q = torch.linalg.eigh(A @ A.mT)
    inverse_b, inverse_a = pseudo_inverse(p, P), pseudo_inverse(q, Q)
    best_a = inverse_b @ gA / scale**2
    best_b = (gB - B @ (inverse_b @ (B.mT @ gB))) @ inverse_a / scale**2
    if not bool((p > least(p)).any()):  # B is 0, at the start: nothing of A moves ΔW
        return best_b, gA
    # BᵀB·X + X·AAᵀ = −best_a·Aᵀ, solved where both Gram matrices are diagonal
    sums = p[:, None] + q
    right = P.mT @ (-best_a @ A.mT) @ Q
    X = P @ torch.where(sums > least(sums), right / sums, 0.0) @ Q.mT
    return best_b - B @ X, best_a + X @ A
