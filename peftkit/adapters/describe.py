"""A kind in numbers and words: what it is, its options, and how many numbers it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peftkit.adapters import registry
from peftkit.adapters.facts import Facts
from peftkit.geometry import Shape


@dataclass(frozen=True)
class Description:
    """What there is to know of a kind.

    Attributes:
        kind: the registered name.
        aliases: its other names.
        facts: family, formula, when to use it, and its names in PEFT and LyCORIS.
        paper: where it is described.
        options: every option with its value.
        reads_base: whether ΔW depends on the weight.
        rows: of the weight that parameters are counted for.
        columns: of that weight.
        parameters: how many numbers are trained, with what several layers share.
    """

    kind: str
    aliases: tuple[str, ...]
    facts: Facts
    paper: str
    options: dict[str, Any]
    reads_base: bool
    rows: int
    columns: int
    parameters: int


def describe(kind: str, rows: int = 768, columns: int = 768, **options: Any) -> Description:
    """Return what a kind is, and how many numbers it trains on one matrix. No memory is taken for it.

    Args:
        kind: a registered name or alias.
        rows: of the matrix, its outputs.
        columns: of the matrix, its inputs.
        **options: of the kind; the others have their defaults.

    Raises:
        UnknownAdapterError: no adapter has this name.
        OptionError: the kind does not have an option, or it cannot take the value for this matrix.

    Example:
        >>> found = pk.describe("lora", 320, 768, rank=4)
        >>> found.facts.formula, found.facts.family, found.parameters
        ('γ·B·A', 'low rank', 4352)
    """
    cls = registry.get(kind)
    weight = torch.empty(rows, columns, device="meta")
    adapter = registry.build(kind, Shape(rows, columns), weight, **options)
    return Description(
        kind=cls.kind,
        aliases=registry.aliases(cls.kind),
        facts=cls.facts,
        paper=cls.paper,
        options=dict(adapter.options),
        reads_base=cls.reads_base,
        rows=rows,
        columns=columns,
        parameters=sum(p.numel() for p in adapter.parameters() if p.requires_grad),
    )
