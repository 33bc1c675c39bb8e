"""VeRA: vectors that scale frozen random factors, which all layers share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.bank import bank
from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, require_rank
from peftkit.adapters.peft_form import PeftForm, VeRAForm
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.geometry import Shape


@register("vera")
class VeRA(Adapter):
    r"""Adds frozen random factors under trained vectors: ΔW = diag(b)·B·diag(d)·A.

    Parameters are `lambda_b`, b (m,), which starts at 0, and `lambda_d`, d (r,), which starts at `d_initial`. B (m, r)
    and A (r, n) are U(±√(6/r)) and U(±√(6/n)), the first rows of two tables that `seed` alone determines: every layer
    takes its part of them, a file holds none, and another set of target modules changes none. With `save_projection`
    the file has the layer's part of both, which may then be of other tables, such as PEFT's, which depend on the set of
    target modules.

    Paper: https://arxiv.org/abs/2310.11454.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 256 by default.
        d_initial: What d starts at.
        seed: Of the two tables.
        save_projection: Keep B and A in the file.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "vera", rank=32)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # m + r
        40
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    facts: ClassVar[Facts] = Facts(
        "frozen factors", "diag(b)·B·diag(d)·A", "files of a few kilobytes are wanted, many of them", peft="VeraConfig"
    )
    convention: ClassVar[str] = "diag(b)@B@diag(d)@A, bank 1"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"lambda_b"})
    starts_at_zero = frozenset({"lambda_b"})
    decays = frozenset({"lambda_b", "lambda_d"})
    left: Tensor
    right: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 256,
        d_initial: float = 0.1,
        seed: int = 0,
        save_projection: bool = False,
    ) -> None:
        super().__init__()
        require_rank("vera", rank)
        self.seed, self.columns, self.save_projection = seed, shape.columns, save_projection
        new = factory(weight)
        self.lambda_b = nn.Parameter(torch.zeros(shape.rows, **new))
        self.lambda_d = nn.Parameter(torch.full((rank,), float(d_initial), **new))
        up = bank(seed, "vera up", shape.rows, rank, self.lambda_b) * (6 / rank) ** 0.5
        down = bank(seed, "vera down", shape.columns, rank, self.lambda_b).mT * (6 / shape.columns) ** 0.5
        self.register_buffer("left", up, persistent=save_projection)
        self.register_buffer("right", down, persistent=save_projection)

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(self.lambda_b[:, None] * self.left, self.lambda_d[:, None] * self.right)

    def form(self, weight: Tensor) -> PeftForm:
        d, down = self.lambda_d, self.right
        if not self.save_projection:  # every layer's A is of one table but for a factor, which d takes
            d = d * (6 / self.columns) ** 0.5
            down = bank(self.seed, "vera down", self.columns, len(d), d).mT
        tables = {"vera_A": down, "vera_B": self.left}
        options = {"r": len(d), "projection_prng_key": self.seed, "save_projection": True}
        own = {"vera_lambda_b": self.lambda_b, "vera_lambda_d": d}
        return VeRAForm("vera", ("VERA", options), own, self.delta(weight), tables)
