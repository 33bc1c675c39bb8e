"""Form: what an adapter changes, without its base, and how the files of other programs hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from peftkit.delta import Delta, LowRank
from peftkit.geometry import Shape

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target

#: PEFT's type of a folder, and the options of its configuration
PeftConfig = tuple[str, dict[str, Any]]


class Form(ABC):
    """An adapter's numbers without its base, which other programs may be able to hold as they are.

    A kind that reads its base and that other programs know defines a subclass beside itself and returns an instance
    from `Adapter.form`. A kind whose ΔW has a structure of its own subclasses `Additive` and names the subclass in
    `Adapter.additive`.
    """

    #: whether the form has magnitudes beside a direction
    decomposed: ClassVar[bool] = False
    #: whether it is ΔW alone, in whichever structure
    is_change: ClassVar[bool] = False

    @abstractmethod
    def structure(self, program: Target) -> str:
        """Return what the program calls this form: the name to look for in `Target.reads`."""

    @abstractmethod
    def refusal(self, program: Target, shape: Shape) -> str:
        """Return why the program cannot hold this form on a weight of that shape, "" where it can."""

    @abstractmethod
    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        """Return the tensors of one module, by what follows the module's name in the program's files.

        Args:
            program: one that `refusal` has nothing against.
            shape: of the weight.
            alpha: the one of all low-rank modules of the file; what α/r leaves over is folded into a factor.
        """

    #: the rows that are all it is of; none of it is of all
    numbers: Sequence[int] = ()

    @property
    def change(self) -> Delta | None:
        """ΔW, where it is the same on any base; None elsewhere."""
        return None

    @property
    def lora(self) -> LowRank | None:
        """The product B·A that goes into the file as two factors; None for other structures."""
        return None

    def balanced(self) -> Form:
        """Return the same form with factors of equal norms, where their norms are free."""
        return self

    def peft_rank(self, shape: Shape) -> int:
        """Return the rank that PEFT's configuration gives a module with this form."""
        del shape
        return 1

    @classmethod
    def peft_tables(cls, written: Sequence[tuple[Any, Shape]]) -> dict[str, Tensor] | None:
        """Return what a folder of PEFT holds once for all of these modules, by PEFT's names; None if they differ in it.

        written: as in `peft_config`.
        """
        del written
        return {}

    @classmethod
    def peft_config(cls, written: Sequence[tuple[Any, Shape]]) -> PeftConfig | None:
        """Return the type and the options of a folder of PEFT with just these modules; None where PEFT has none.

        written: forms of this class, each with the shape of its weight.
        """
        del written
        return None


@dataclass(frozen=True)
class Additive(Form):
    """ΔW itself, the same on any base: as the tensor "diff", unless a kind gives its structure factors."""

    is_change: ClassVar[bool] = True

    delta: Delta

    @property
    def change(self) -> Delta:
        return self.delta

    def structure(self, program: Target) -> str:
        del program
        return self.delta.structure or "full"

    def refusal(self, program: Target, shape: Shape) -> str:
        structure = self.structure(program)
        unknown = structure not in program.reads
        return program.refusal(structure, shape) or first_reason((unknown, f"{program.title} has no {structure}"))

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        del program, alpha
        return {"diff": self.delta.dense().reshape(shape.rows, shape.channels, *shape.kernel)}


def first_reason(*checks: tuple[bool, str]) -> str:
    """Return the reason of the first check that holds, "" where none does."""
    return next((reason for holds, reason in checks if holds), "")


def per_row(vector: Tensor, shape: Shape) -> Tensor:
    """Return a vector (m,) as (m, 1, …), in as many dimensions as the weight has."""
    return vector.reshape(-1, 1, *(1,) * len(shape.kernel))


def per_channel(vector: Tensor, shape: Shape) -> Tensor:
    """Return a vector (channels,) as (1, channels, …), in as many dimensions as the weight has."""
    return vector.reshape(1, -1, *(1,) * len(shape.kernel))
