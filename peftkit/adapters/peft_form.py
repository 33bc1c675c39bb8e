"""PeftForm: how PEFT stores the kinds of this library that it has too, on Linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftkit.adapters.form import Form, PeftConfig, first_reason
from peftkit.delta import Delta
from peftkit.geometry import Shape

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


@dataclass(frozen=True)
class PeftForm(Form):
    """An adapter as PEFT stores it where it is a Linear's; its ΔW for every other program and layer.

    Attributes:
        name: What `Target.reads` calls it.
        peft: PEFT's type and the entries of its configuration, which are one for all modules of a folder.
        own: The tensors of the module, as PEFT calls them.
        delta: ΔW, None where it depends on the base.
        tables: The rows and columns that it reads of tables that all modules share, as PEFT calls them.
    """

    name: str
    peft: PeftConfig
    own: Mapping[str, Tensor]
    delta: Delta | None
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def change(self) -> Delta | None:
        return self.delta

    def structure(self, program: Target) -> str:
        del program
        return self.name

    def refusal(self, program: Target, shape: Shape) -> str:
        elsewhere = bool(shape.kernel) or shape.experts > 1
        return first_reason(
            (self.name not in program.reads, f"{program.title} has no {self.name} of this form"),
            (elsewhere, f"{program.title} has {self.name} on Linears only"),
        )

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        del program, shape, alpha
        return dict(self.own)

    def table_sizes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the sizes that PEFT expects of the tables, where its layers have at most these rows and columns."""
        del rows, columns
        return {}

    @classmethod
    def peft_config(cls, written: Sequence[tuple[PeftForm, Shape]]) -> PeftConfig | None:
        """Return the type and the options, None where modules differ in them or are of other tables."""
        first = written[0][0].peft
        one = all(form.peft == first for form, _ in written)
        return first if one and cls.peft_tables(written) is not None else None

    @classmethod
    def peft_tables(cls, written: Sequence[tuple[Any, Shape]]) -> dict[str, Tensor] | None:
        rows, columns = (max(sizes) for sizes in zip(*((s.rows, s.columns) for _, s in written), strict=True))
        found: dict[str, Tensor] = {}
        for name, size in written[0][0].table_sizes(rows, columns).items():
            parts = [form.tables[name] for form, _ in written]
            table = found[name] = parts[0].new_zeros(size)
            places = [tuple(slice(extent) for extent in part.shape) for part in parts]
            for place, part in zip(places, parts, strict=True):
                table[place] = part
            if not all(table[place].equal(part) for place, part in zip(places, parts, strict=True)):
                return None
        return found


class CommonForm(PeftForm):
    """What all modules share is whole in each."""

    def table_sizes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        del rows, columns
        return {name: tuple(table.shape) for name, table in self.tables.items()}


class VeRAForm(PeftForm):
    """Vectors, and tables as large as the largest layer needs."""

    def table_sizes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        rank = self.peft[1]["r"]
        return {"vera_A": (rank, columns), "vera_B": (rows, rank)}


class RandLoRAForm(PeftForm):
    """Scales, and bases as many and as large as PEFT expects for a layer of the most rows and the most columns."""

    def table_sizes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        rank, (short, long) = self.peft[1]["r"], sorted((rows, columns))
        return {"randlora_A": (rank, 1, short), "randlora_B": (long, -(-short // rank), rank)}
