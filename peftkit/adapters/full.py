"""Full: ΔW itself, trained or taken from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.form import Additive
from peftkit.adapters.options import factory
from peftkit.adapters.registry import register
from peftkit.delta import Dense
from peftkit.geometry import Shape


@register("full", "diff")
class Full(Adapter):
    """Adds a whole matrix: ΔW = M, full fine-tuning kept apart from the base.

    The parameter `change`, M (m, n), starts at 0. Any ΔW can be written as a Full. It is the kind for norms and biases,
    whose change is a column (p, 1); on every bias it is BitFit, https://arxiv.org/abs/2106.10199.

    Source: LyCORIS' "full" and the "diff" of WebUI files, https://github.com/KohakuBlueleaf/LyCORIS.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "full")
        >>> sum(p.numel() for p in pk.adapter_parameters(model))
        128
    """

    paper: ClassVar[str] = "https://github.com/KohakuBlueleaf/LyCORIS"
    convention: ClassVar[str] = "change"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"change"})
    decays = frozenset({"change"})
    vectors: ClassVar[bool] = True
    additive = Additive

    def __init__(self, shape: Shape, weight: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(shape.rows, shape.columns, **factory(weight)))

    @classmethod
    def row_parameters(cls, options: Mapping[str, Any]) -> frozenset[str]:
        del options
        return frozenset({"change"})

    def delta(self, weight: Tensor) -> Dense:
        del weight
        return Dense(self.change)
