"""SVDiff: train the singular values of the base."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import MADE_OF_BASE, Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.frame import frame
from peftkit.adapters.options import factory
from peftkit.adapters.registry import register
from peftkit.delta import DiagonalLowRank
from peftkit.geometry import Shape


@register("svdiff")
class SVDiff(Adapter):
    r"""Changes the base's singular values: ΔW = U·diag(max(S + δ, 0) − S)·Vᵀ, with W = U·S·Vᵀ.

    The parameter is `shift`, δ (k,), which starts at 0, k = min(m, n). U (m, k), S and Vᵀ (k, n) are computed from W
    and frozen. A convolution is read as its matrix (outputs, channels × kernel), as in the paper. A forward costs as
    much as two more layers: route="dense" is the faster one.

    Paper: https://arxiv.org/abs/2303.11305.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), of which the singular values are changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "svdiff")
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # min(m, n)
        8
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2303.11305"
    facts: ClassVar[Facts] = Facts(
        "factors of the base",
        "U·diag(max(S + δ, 0) − S)·Vᵀ",
        "there are a few images, and little is to change",
    )
    convention: ClassVar[str] = "U@diag(max(S+shift,0)-S)@V"
    on_another_base: ClassVar[str] = MADE_OF_BASE.format("singular vectors")
    decays = frozenset({"shift"})
    left: Tensor
    values: Tensor
    right: Tensor

    def __init__(self, shape: Shape, weight: Tensor) -> None:
        super().__init__()
        left, values, right = frame(weight)
        self.register_buffer("left", left)
        self.register_buffer("values", values)
        self.register_buffer("right", right)
        self.shift = nn.Parameter(torch.zeros(min(shape.rows, shape.columns), **factory(weight)))

    def delta(self, weight: Tensor) -> DiagonalLowRank:
        del weight
        change = torch.maximum(self.shift, -self.values)
        return DiagonalLowRank(self.left * change, self.right, self.left, change)

    @torch.no_grad()
    def rebase_(self, weight: Tensor) -> None:
        for own, new in zip((self.left, self.values, self.right), frame(weight), strict=True):
            own.copy_(new)

    def derived(self) -> dict[str, Tensor]:
        return {"left": self.left, "values": self.values, "right": self.right}
