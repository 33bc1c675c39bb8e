"""Full: ΔW itself, trained or taken from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Additive, Form, PeftConfig, first_reason
from peftkit.adapters.options import factory, require
from peftkit.adapters.registry import register
from peftkit.delta import Dense, SelectedRows
from peftkit.geometry import Shape

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


@dataclass(frozen=True)
class RowsForm(Form):
    """Rows that take the place of W's, as PEFT keeps trained tokens: their values and their numbers."""

    value: Tensor
    numbers: Sequence[int] = ()

    def structure(self, program: Target) -> str:
        del program
        return "full rows"

    def refusal(self, program: Target, shape: Shape) -> str:
        unknown = self.structure(program) not in program.reads
        return program.refusal("full", shape) or first_reason((unknown, f"{program.title} has no trained rows of it"))

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        del program, shape, alpha
        return {"trainable_tokens_delta": self.value}

    @classmethod
    def peft_config(cls, written: Sequence[tuple[Any, Shape]]) -> PeftConfig | None:
        numbers = [list(form.numbers) for form, _ in written]
        alike = all(own == numbers[0] for own in numbers)
        return ("TRAINABLE_TOKENS", {"token_indices": numbers[0]}) if alike else None


@register("full", "diff")
class Full(Adapter):
    """Adds a whole matrix: ΔW = M, full fine-tuning kept apart from the base.

    The parameter `change`, M (m, n), starts at 0. Any ΔW can be written as a Full. It is the kind for norms and biases,
    whose change is a column (p, 1); on every bias it is BitFit, https://arxiv.org/abs/2106.10199.

    With `rows`, only these rows of W are trained, such as the tokens that were added to an embedding. The parameter
    `value` (k, n) starts at W[rows] and takes their place: ΔW[rows] = value − W[rows], whatever these rows are in the
    model that a file is loaded onto. This is what PEFT calls trainable tokens.

    Source: LyCORIS' "full" and the "diff" of WebUI files, https://github.com/KohakuBlueleaf/LyCORIS.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype, and with `rows` for the values of these.
        rows: The numbers of the rows to train, all by default.

    Raises:
        OptionError: The rows are no numbers of rows of W.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "full")
        >>> sum(p.numel() for p in pk.adapter_parameters(model))
        128
    """

    paper: ClassVar[str] = "https://github.com/KohakuBlueleaf/LyCORIS"
    facts: ClassVar[Facts] = Facts(
        "whole matrices",
        "M",
        "nothing is to be restricted, and a matrix of the weight's size may be trained",
        lycoris="full",
    )
    convention: ClassVar[str] = "change"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"change"})
    decays = frozenset({"change"})
    vectors: ClassVar[bool] = True
    additive = Additive

    index: Tensor

    def __init__(self, shape: Shape, weight: Tensor, *, rows: Sequence[int] | None = None) -> None:
        super().__init__()
        self.height, self.change, self.value = shape.rows, None, None
        if rows is None:
            self.change = nn.Parameter(torch.zeros(shape.rows, shape.columns, **factory(weight)))
            return
        own = _numbers(rows, shape.rows)
        self.options = {"rows": own}
        self.reads_base = self.replaces = True
        index = torch.tensor(own, device=weight.device)
        self.register_buffer("index", index, persistent=False)
        self.value = nn.Parameter(weight.detach()[index].to(**factory(weight), copy=True))

    def form(self, weight: Tensor) -> RowsForm | None:
        del weight
        return None if self.value is None else RowsForm(self.value.detach(), list(self.options["rows"]))

    @classmethod
    def needs_base(cls, options: Mapping[str, Any]) -> bool:
        return options.get("rows") is not None

    @classmethod
    def row_parameters(cls, options: Mapping[str, Any]) -> frozenset[str] | None:
        return frozenset({"change"}) if options.get("rows") is None else None

    def delta(self, weight: Tensor) -> Dense | SelectedRows:
        if self.value is None:
            assert self.change is not None
            return Dense(self.change)
        return SelectedRows(self.value - weight[self.index].to(self.value.dtype), (self.index,), self.height)


def _numbers(rows: object, height: int) -> list[int]:
    """Distinct numbers of rows in order, as a list."""
    given = list(rows) if isinstance(rows, Iterable) and not isinstance(rows, str) else []
    sound = bool(given) and all(type(row) is int and 0 <= row < height for row in given)
    require(sound and len({*given}) == len(given), "full", "rows", rows, f"distinct numbers from 0 to {height - 1}")
    return sorted(given)
