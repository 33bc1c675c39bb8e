"""OFT: rotate blocks of the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.cayley import bound_on_norm, bounded, cayley, cayley_series, skew_blocks, upper_triangle
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Form, PeftConfig, first_reason, per_row
from peftkit.adapters.options import factory, require
from peftkit.adapters.registry import register
from peftkit.delta import Delta, Rotation
from peftkit.errors import OptionError
from peftkit.geometry import Shape
from peftkit.kernels.cache import Memo

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target

#: the alpha of written blocks, which bounds ‖Q‖ there: large enough for no bound, where 0 means "none" to some programs
#: and "nothing" to others
UNBOUNDED = 1000.0

#: the version of PEFT whose series is written, which before 0.18 was another, and is so where a folder says none
_SERIES_OF = "0.21.2"


def divisor_at_most(size: int, bound: int) -> int:
    """The largest divisor of size that is at most bound."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return max(d for d in (*small, *(size // d for d in small)) if d <= bound)


def beyond_bound(Q: Tensor) -> tuple[bool, str]:
    """Check that no loader scales the skew blocks Q down to the alpha that is written beside them."""
    beyond = float(torch.linalg.vector_norm(Q)) >= UNBOUNDED
    return beyond, "its rotation is larger than the bound that has to be written"


@dataclass(frozen=True)
class RotationForm(Form):
    """Skew blocks Q (k, b, b), a factor per rotated coordinate or None, and the rotated side, "out" or "in".

    terms: of the series that stands for the Cayley transform, None for the transform itself.
    """

    Q: Tensor
    rescale: Tensor | None
    side: str
    terms: int | None

    def structure(self, program: Target) -> str:
        del program
        return "oft in" if self.side == "in" else "oft" if self.rescale is None else "oft rescaled"

    def refusal(self, program: Target, shape: Shape) -> str:
        name, inwards = self.structure(program), self.side == "in"
        blocks, size = self.Q.shape[:2]
        series = f"{program.title} has no series of 3 terms: its 3 are 4"
        overlaps = inwards and (self.rescale is not None or shape.positions > 1)
        patches = "PEFT's OFT has no factors, and its convolutions with a kernel rotate overlapping patches twice"
        return (
            program.refusal(name, shape)
            or first_reason(
                (name not in program.reads, f"{program.title} has no OFT that rotates the {self.side} side this way"),
                (
                    not inwards and self.terms is not None,
                    f"{program.title} solves for the rotation, this one is a series",
                ),
                (overlaps, patches),
                (inwards and self.terms == 3, series),
            )
            or first_reason(
                (False, "") if inwards or self.rescale is not None else beyond_bound(self.Q),
                (
                    program.infers_sizes and size > blocks,
                    f"{program.title} cannot reload blocks larger than their number",
                ),
            )
        )

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        del program, alpha
        if self.side == "in":  # PEFT inverts an exact rotation, and not a series
            i, j = torch.triu_indices(self.Q.shape[1], self.Q.shape[1], 1)
            upper = self.Q[:, i, j] / (2 if self.terms == 2 else 1)  # its series of 2 terms is I + 2Q
            return {"oft_R.weight": -upper if self.terms is None else upper}
        # Blocks A with Q = Aᵀ − A, because kohya and LyCORIS apply Rᵀ
        tensors = {"oft_blocks": -self.Q.triu(1), "alpha": torch.tensor(UNBOUNDED)}
        return tensors if self.rescale is None else tensors | {"rescale": per_row(self.rescale, shape)}

    @classmethod
    def peft_config(cls, written: Sequence[tuple[Any, Shape]]) -> PeftConfig | None:
        if len({(form.Q.shape[1], form.terms) for form, _ in written}) > 1:
            return None
        size, terms = written[0][0].Q.shape[1], written[0][0].terms
        series: dict[str, Any] = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
        if terms is not None:
            series["peft_version"] = _SERIES_OF
        return "OFT", {"r": 0, "oft_block_size": size, "bias": "none", **series}


@register("oft")
class OFT(Adapter):
    r"""Rotates the weight by blocks: W + ΔW = R·W or W·Rᵀ, R = diag(R_1, …, R_k), R_i = (I + Q_i)(I − Q_i)⁻¹.

    The parameter `skew` (k, b(b−1)/2) holds the upper triangles of the skew blocks Q_i (b, b), and starts at 0. The
    Cayley transform is solved in at least fp32, so R is orthogonal to 1e-6 in whatever dtype parameters are kept.

    Papers: OFT, https://arxiv.org/abs/2306.07280; BOFT, https://arxiv.org/abs/2311.06243.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        block_size: The bound on b, the largest divisor of the rotated dimension up to it; 32 by default.
        blocks: The number k of blocks, a divisor of the rotated dimension, in place of `block_size`.
        side: "out" (default) rotates output channels, as LyCORIS and kohya do, on any convolution; "in" rotates the
            fan-in, as PEFT does.
        constraint: The bound on ‖Q‖_F as a multiple of the rotated dimension (COFT), None for no bound.
        rescale: Train a factor per rotated coordinate beside R.
        path: What strength λ means. "linear" (default) is W + λ(R − I)W; "geodesic" is Cayley(λQ)·W, orthogonal at
            every λ and its own inverse at −λ.
        terms: Make R of so many terms of the series I + 2Q + 2Q² + … + Qᵗ⁻¹, orthogonal only where Q is small, as PEFT
            trains by default (5); PEFT's 3 are 4 of these, and its 2 are 2 of Q/2. None (default) solves for R.

    Raises:
        OptionError: An option has a value that it cannot take, or the weight has no such blocks.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "oft", block_size=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # 2 blocks of 6
        12
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07280"
    facts: ClassVar[Facts] = Facts(
        "rotations", "(R − I)·W", "norms and angles between neurons must stay", peft="OFTConfig", lycoris="diag-oft"
    )
    convention: ClassVar[str] = "cayley(I+Q)(I-Q)^-1,upper triangle row by row"
    reads_base = True
    on_another_base: ClassVar[str] = "rotates the new base the same way"
    decays = frozenset({"skew"})

    upper: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        block_size: int | None = None,
        blocks: int | None = None,
        side: str = "out",
        constraint: float | None = None,
        rescale: bool = False,
        path: str = "linear",
        terms: int | None = None,
    ) -> None:
        super().__init__()
        require(side in ("out", "in"), "oft", "side", side, "'out' or 'in'")
        require(path in ("linear", "geodesic"), "oft", "path", path, "'linear' or 'geodesic'")
        sensible = terms is None or 1 < terms <= 1000
        require(sensible, "oft", "terms", terms, "an integer from 2 to 1000, or None to solve for R")
        if block_size is not None and blocks is not None:
            raise OptionError(f"oft: block_size={block_size} and blocks={blocks} were given; give one of them")
        size = shape.rows if side == "out" else shape.columns
        if blocks is not None:
            fits = isinstance(blocks, int) and blocks > 0 and size % blocks == 0
            require(fits, "oft", "blocks", blocks, f"a divisor of {size}, the {side} dimension of this {shape} weight")
            b = size // blocks
        else:
            bound = 32 if block_size is None else block_size
            require(isinstance(bound, int) and bound > 0, "oft", "block_size", block_size, "a positive integer")
            b = divisor_at_most(size, bound)
        if b < 2:
            raise OptionError(
                f"oft: a block of {b} cannot rotate, and {size}, the {side} dimension of this {shape} weight, "
                "has no divisor between 2 and the block size; use a larger block, "
                f"or side={'in' if side == 'out' else 'out'!r}"
            )
        self.side, self.linear, self.size, self.terms = side, path == "linear", b, terms
        self.bound = bound_on_norm("oft", constraint, size)
        new = factory(weight)
        self.skew = nn.Parameter(torch.zeros(size // b, b * (b - 1) // 2, **new))
        self.rescale = nn.Parameter(torch.ones(size, **new)) if rescale else None
        self.register_buffer("upper", upper_triangle(b, weight.device), persistent=False)
        self._memo: Memo[Tensor] = Memo()

    @classmethod
    def row_parameters(cls, options: Mapping[str, Any]) -> frozenset[str] | None:
        return frozenset() if options.get("side", "out") == "in" else None

    def delta(self, weight: Tensor) -> Rotation:
        return self._rotation(weight, self._memo(lambda: self._turn(bounded(self.skew, self.bound)), self.skew))

    def at(self, weight: Tensor, strength: float | Tensor) -> Delta:
        if self.linear:
            return super().at(weight, strength)
        return self._rotation(weight, self._turn(strength * bounded(self.skew, self.bound)), strength)

    def generator(self) -> Tensor:
        """Return Q (k, b, b), skew-symmetric, inside the constraint."""
        return skew_blocks(bounded(self.skew, self.bound), self.upper, self.size)

    def form(self, weight: Tensor) -> RotationForm:
        del weight
        return RotationForm(self.generator(), detached(self.rescale), self.side, self.terms)

    @classmethod
    def structure(cls, options: Mapping[str, Any]) -> str:
        if options.get("side") == "in":
            return "oft in"
        return "oft rescaled" if options.get("rescale") else "oft"

    def _turn(self, skew: Tensor) -> Tensor:
        """R − I of the upper triangles of a generator."""
        if self.terms is None:
            return cayley(skew, self.upper, self.size)
        return cayley_series(skew_blocks(skew, self.upper, self.size), self.terms)

    def _rotation(self, weight: Tensor, K: Tensor, strength: float | Tensor = 1.0) -> Rotation:
        if self.rescale is not None:
            factor = (strength * (self.rescale.to(K.dtype) - 1)).unflatten(0, (-1, self.size))
            K = K + factor[:, :, None] * (K + torch.eye(self.size, dtype=K.dtype, device=K.device))
        return Rotation(K, weight, self.side)


def detached(factors: Tensor | None) -> Tensor | None:
    """Return trained factors for a file, None where there are none."""
    return None if factors is None else factors.detach()
