"""BOFT: rotate the weight by a butterfly of small blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.cayley import bound_on_norm, bounded, cayley, skew_blocks, upper_triangle
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Form, first_reason, per_row
from peftkit.adapters.oft import UNBOUNDED, beyond_bound, detached
from peftkit.adapters.options import factory, require
from peftkit.adapters.registry import register
from peftkit.delta import Butterfly
from peftkit.errors import OptionError
from peftkit.geometry import Shape
from peftkit.kernels.cache import Memo

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


def butterfly_block(size: int, bound: int) -> int | None:
    """Return the largest even b ≤ bound with size/b a power of two, as LyCORIS splits it; None if there is none."""
    halvings = (size >> i for i in range(size.bit_length()) if size % (1 << i) == 0)
    return next((b for b in halvings if b <= bound and b % 2 == 0), None)


@dataclass(frozen=True)
class ButterflyForm(Form):
    """Skew blocks Q (t, k, b, b) of every stage, and a factor per output or None."""

    Q: Tensor
    rescale: Tensor | None

    def structure(self, program: Target) -> str:
        del program
        return "boft"

    def refusal(self, program: Target, shape: Shape) -> str:
        return program.refusal("boft", shape) or first_reason(
            beyond_bound(self.Q), ("boft" not in program.reads, f"{program.title} has no BOFT of outputs")
        )

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        """Blocks A with Q = A − Aᵀ. LyCORIS reads all stages there can be: missing ones are written as no rotation."""
        del program, alpha
        blocks = self.Q.triu(1)
        missing = blocks.shape[1].bit_length() - len(blocks)
        blocks = torch.cat([blocks, blocks.new_zeros(missing, *blocks.shape[1:])])
        tensors = {"oft_blocks": blocks, "alpha": torch.tensor(UNBOUNDED)}
        return tensors if self.rescale is None else tensors | {"rescale": per_row(self.rescale, shape)}


@register("boft")
class BOFT(Adapter):
    r"""Rotates output channels in stages: W + ΔW = s∘(R_t ⋯ R_1·W), a butterfly of small blocks, as in LyCORIS.

    Each stage R_i consists of blocks (I + Q)(I − Q)⁻¹ over rows 2ⁱ⁻¹·b/2 apart, with Q (b, b) skew. The parameter
    `skew` (t, k, b(b−1)/2) holds the upper triangles of all Q, and starts at 0.

    Paper: https://arxiv.org/abs/2311.06243.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        block_size: The bound on the size b of a block, 4 by default; b is even, and the number k of blocks is a power
            of two.
        stages: t, by default all log₂k + 1, after which every output has met every other.
        constraint: The bound on ‖Q‖_F over all stages as a multiple of the rows, None for no bound.
        rescale: Train a factor s per output.

    Raises:
        OptionError: An option has a value that it cannot take, or the weight has no such blocks.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "boft", block_size=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # 2 stages of 2 blocks of 6
        24
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.06243"
    facts: ClassVar[Facts] = Facts(
        "rotations",
        "(R_t ⋯ R_1 − I)·W",
        "OFT's blocks are too far apart, and more time a step is there",
        lycoris="boft",
    )
    convention: ClassVar[str] = "stages of cayley(I+Q)(I-Q)^-1 on outputs,upper triangle row by row"
    reads_base = True
    on_another_base: ClassVar[str] = "rotates the new base the same way"
    decays = frozenset({"skew"})

    upper: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        block_size: int = 4,
        stages: int | None = None,
        constraint: float | None = None,
        rescale: bool = False,
    ) -> None:
        super().__init__()
        require(block_size > 1, "boft", "block_size", block_size, "an integer above 1")
        b = butterfly_block(shape.rows, block_size)
        if b is None:
            raise OptionError(
                f"boft: block_size={block_size} was given, but no even number up to it leaves a power of two of blocks "
                f"in the {shape.rows} rows of this weight; use a larger one, or oft"
            )
        blocks = shape.rows // b
        most = blocks.bit_length()
        count = most if stages is None else stages
        require(0 < count <= most, "boft", "stages", stages, f"a number from 1 to {most}, or None for all")
        self.size, self.bound = b, bound_on_norm("boft", constraint, shape.rows)
        new = factory(weight)
        self.skew = nn.Parameter(torch.zeros(count, blocks, b * (b - 1) // 2, **new))
        self.rescale = nn.Parameter(torch.ones(shape.rows, **new)) if rescale else None
        self.register_buffer("upper", upper_triangle(b, weight.device), persistent=False)
        self._memo: Memo[Tensor] = Memo()

    def delta(self, weight: Tensor) -> Butterfly:
        K = self._memo(lambda: cayley(bounded(self.skew, self.bound), self.upper, self.size), self.skew)
        rescale = None if self.rescale is None else self.rescale.to(K.dtype)
        return Butterfly(K, weight, rescale)

    def generator(self) -> Tensor:
        """Return Q (t, k, b, b), skew-symmetric, inside the constraint."""
        return skew_blocks(bounded(self.skew, self.bound), self.upper, self.size)

    def form(self, weight: Tensor) -> ButterflyForm:
        del weight
        return ButterflyForm(self.generator(), detached(self.rescale))
