"""LoKr: a Kronecker product of a small matrix and a large one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter, Stored, placeholder_weight
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Additive, PeftConfig
from peftkit.adapters.lora import tucker_down
from peftkit.adapters.options import (
    Factory,
    factory,
    rank_scale,
    require,
    require_kernel,
    require_rank,
    times,
    uniform_fan_in_,
)
from peftkit.adapters.registry import register
from peftkit.delta import Kron
from peftkit.delta.base import identity_factors
from peftkit.geometry import Shape

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


def factorize(size: int, factor: int) -> tuple[int, int]:
    """Return (u, v) with u·v = size and u = max{u ≤ min(factor, √size) : u divides size}; factor −1 means √size.

    Equation (5) of the LyCORIS paper, so u ≤ v always.
    """
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    u = next(u for u in range(max(1, limit), 0, -1) if size % u == 0)
    return u, size // u


@dataclass(frozen=True)
class LoKrForm(Additive):
    """C ⊗ D, as lokr_w1 and lokr_w2, or lokr_w2_a and lokr_w2_b, under alpha = rank, as LoHa."""

    delta: Kron

    def refusal(self, program: Target, shape: Shape) -> str:
        own = super().refusal(program, shape)
        if own or not program.infers_sizes or self._is_inferred(shape, whole=self._is_whole(program, shape)):
            return own
        return f"{program.title} would choose other sizes for the Kronecker factors"

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        del alpha
        delta = self.delta
        if self._is_whole(program, shape):
            block = delta.D.reshape(delta.block[0], -1, *shape.kernel)
            return {"lokr_w1": delta.C, "lokr_w2": block, "alpha": torch.tensor(1.0)}
        left, right = identity_factors(delta.right) if delta.left is None else (delta.left, delta.right)
        rank = torch.tensor(float(right.shape[0]))
        return {"lokr_w1": delta.C, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": rank}

    def peft_rank(self, shape: Shape) -> int:
        return math.ceil(self._half(shape)) if self._is_whole_from_half(shape) else self.delta.right.shape[0]

    @classmethod
    def peft_config(cls, written: Sequence[tuple[Any, Shape]]) -> PeftConfig | None:
        factor = peft_factor([(form.delta.C.shape, (shape.rows, shape.channels)) for form, shape in written])
        return None if factor is None else ("LOKR", {"decompose_factor": factor, "use_effective_conv2d": False})

    def _half(self, shape: Shape) -> float:
        """Half of the larger side of D, without its kernel: from that rank on LyCORIS and PEFT keep D whole."""
        return max(self.delta.block[0], self.delta.block[1] // shape.positions) / 2

    def _is_whole_from_half(self, shape: Shape) -> bool:
        return self.delta.left is None or self.delta.right.shape[0] >= self._half(shape)

    def _is_whole(self, program: Target, shape: Shape) -> bool:
        """Whether D is written whole. ComfyUI and Forge misread a whole D of a 1- or 3-dimensional kernel.

        LyCORIS takes a whole D of any rank, and finds sizes for it that it does not find for its factors.
        """
        if program.infers_sizes:
            return self._is_whole_from_half(shape) or not self._is_inferred(shape, whole=False)
        if program.builds_lokr:
            return self._is_whole_from_half(shape)
        return self.delta.left is None and len(shape.kernel) in (0, 2)

    def _is_inferred(self, shape: Shape, *, whole: bool) -> bool:
        """Whether LyCORIS, which infers its option `factor` from the shapes of C and D, makes these shapes of it.

        whole: D is written whole. It takes the columns of a factor of D, of which each position of a kernel is one, for
        input channels.
        """
        (u_p, u_q), (v_p, v_d) = self.delta.C.shape, self.delta.block
        rows, channels = u_p * v_p, shape.channels
        if v_d % shape.positions or channels * shape.positions != u_q * v_d or u_p > v_p or u_q * u_q > channels:
            return False
        v_q = v_d // shape.positions if whole else v_d
        if (u_p, u_q) == (factorize(rows, -1)[0], factorize(u_q * v_q, -1)[0]):
            return u_q == factorize(channels, -1)[0]
        sizes = (max(u_p, u_q), max(v_p, v_q))
        fits = [f for f in sizes if f in (u_p, v_p) and f in (u_q, v_q)]
        factor = fits[0] if fits else min(sizes)
        return (u_p, u_q) == (_lycoris_factor(rows, factor), _lycoris_factor(channels, factor))


def _lycoris_factor(size: int, factor: int) -> int:
    """The smaller factor LyCORIS splits a size into: a divisor as it is, else the most even split below it."""
    return min(factor, size // factor) if size % factor == 0 else factorize(size, factor)[0]


def peft_factor(shapes: Sequence[tuple[Sequence[int], tuple[int, int]]]) -> int | None:
    """Return the one `decompose_factor` from which PEFT makes all these Kronecker factors, None where there is none.

    shapes: of every C, with the (rows, channels) of its weight.
    """
    candidates = [-1, *dict.fromkeys(u for C, _ in shapes for u in C)]
    for factor in candidates:
        if all(
            (_peft_split(rows, factor), _peft_split(channels, factor)) == tuple(C) for C, (rows, channels) in shapes
        ):
            return factor
    return None


def _peft_split(size: int, factor: int) -> int:
    """The first factor PEFT splits a size into: a divisor as it is, else the most even split below it."""
    return factor if factor > 0 and size % factor == 0 else factorize(size, factor)[0]


@register("lokr")
class LoKr(Adapter):
    r"""Adds a Kronecker product: ΔW = γ·C ⊗ D with C (u_p, u_q) and D (v_p, v_q·K).

    u_p·v_p = m factors the rows, u_q·v_q the input channels. D is full, or a product of rank r.

    Papers: KronA, https://arxiv.org/abs/2212.10650; LyCORIS, https://arxiv.org/abs/2309.14859.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r of D = left·right. None (default), or a rank of at least max(v_p, v_q)/2, keeps D full, as LyCORIS and
            PEFT do.
        alpha: α, by default the rank. γ = α/r.
        factor: The bound on u, for both axes or as (rows, channels), 8 by default; −1 splits as evenly as the size
            allows.
        decompose_both: C = C_left·C_right too, where the rank is below max(u_p, u_q)/2.
        tucker: D = left·(T·V) with a core T (r, r, K), on convolutions with a low-rank D.
        full_scale: γ where both C and D are full. "one" (default), as LyCORIS trains, so that α has no effect; or
            "alpha/rank", as PEFT does.
        outer: The exact shape (u_p, u_q) of C in place of `factor`; decompose_both then splits C at any rank. Files of
            other programs need it.
        full: Whether D is full, in place of the rule of `rank`. Files of other programs need it.
        init: "lycoris" (default) starts at D = 0, "peft" at C = 0.

    Raises:
        OptionError: An option has a value that it cannot take, or the weight has no such factors.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "lokr", factor=2)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # C (2, 2), D (4, 8)
        36
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2212.10650"
    facts: ClassVar[Facts] = Facts(
        "products",
        "γ·C ⊗ D",
        "files are to be small, and little of the base is to change",
        peft="LoKrConfig",
        lycoris="lokr",
    )
    convention: ClassVar[str] = "gamma*kron(outer,block)"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"outer", "outer_left"})
    resizable: ClassVar[frozenset[str]] = frozenset(
        {"rank", "alpha", "factor", "decompose_both", "full_scale", "outer", "full", "init"}
    )
    decays = frozenset({"outer", "outer_left", "outer_right", "block", "left", "right", "core"})
    additive = LoKrForm

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        factor: int | tuple[int, int] = 8,
        decompose_both: bool = False,
        tucker: bool = False,
        full_scale: str = "one",
        outer: tuple[int, int] | None = None,
        full: bool | None = None,
        init: str = "lycoris",
    ) -> None:
        super().__init__()
        if rank is not None:
            require_rank("lokr", rank)
        require(full_scale in ("one", "alpha/rank"), "lokr", "full_scale", full_scale, "'one' or 'alpha/rank'")
        require(init in ("lycoris", "peft"), "lokr", "init", init, "'lycoris' or 'peft'")
        if decompose_both:
            require(rank is not None, "lokr", "rank", rank, "an integer, because decompose_both=True needs one")
        (u_p, v_p), (u_q, v_q) = _split(shape, factor) if outer is None else _split_as(shape, outer)
        if full is None:
            full = rank is None or rank >= max(v_p, v_q) / 2
        require(full or rank is not None, "lokr", "full", full, "True, or a rank")
        split = decompose_both and rank is not None and (outer is not None or rank < max(u_p, u_q) / 2)
        self.scale = _scale(rank, alpha, full_scale if full and not split else "alpha/rank")
        new = factory(weight)
        self.outer, self.outer_left, self.outer_right = None, None, None
        if split and rank is not None:
            self.outer_left = nn.Parameter(uniform_fan_in_(torch.empty(u_p, rank, **new), rank))
            self.outer_right = nn.Parameter(uniform_fan_in_(torch.empty(rank, u_q, **new), u_q))
        else:
            self.outer = nn.Parameter(uniform_fan_in_(torch.empty(u_p, u_q, **new), u_q))
        self._make_block(shape, v_p, v_q, None if full else rank, tucker, new)
        self.starts_at_zero = frozenset({"block", "right"} if init == "lycoris" else {"outer", "outer_left"})
        for name in self.starts_at_zero:
            parameter = getattr(self, name)
            if parameter is not None:
                nn.init.zeros_(parameter)

    def _make_block(self, shape: Shape, v_p: int, v_q: int, rank: int | None, tucker: bool, new: Factory) -> None:
        """Make the parameters of D (v_p, v_q·K): D itself, or left·right of a rank, or left·(core·right)."""
        self.block, self.left, self.right, self.core = None, None, None, None
        columns = v_q * shape.positions
        if rank is None:
            require(not tucker, "lokr", "tucker", tucker, f"a rank below {max(v_p, v_q) / 2:g} for this {shape} weight")
            self.block = nn.Parameter(uniform_fan_in_(torch.empty(v_p, columns, **new), columns))
            return
        # Both peers store `left` transposed beside a Tucker core, so that its fan-in is the rows of D
        self.left = nn.Parameter(uniform_fan_in_(torch.empty(v_p, rank, **new), v_p if tucker else rank))
        if tucker:
            require_kernel("lokr", shape)
            core = torch.empty(rank, rank, shape.positions, **new)
            self.core = nn.Parameter(uniform_fan_in_(core, rank * shape.positions))
            columns = v_q
        self.right = nn.Parameter(uniform_fan_in_(torch.empty(rank, columns, **new), columns))

    @classmethod
    def of_rows(cls, stored: Stored, shape: Shape, rows: Tensor) -> Stored:
        # No Kronecker product has any rows but all those of a block: they are written whole
        weight = placeholder_weight(shape)
        adapter = cls(shape, weight, **stored.options)
        adapter.load_state_dict(stored.tensors, assign=True)
        return Stored("full", {}, {"change": adapter.delta(weight).dense().detach()[rows]})

    def delta(self, weight: Tensor) -> Kron:
        del weight
        if self.outer is not None:
            outer = self.outer
        else:
            assert self.outer_left is not None and self.outer_right is not None
            outer = self.outer_left @ self.outer_right
        outer = times(self.scale, outer)
        if self.block is not None:
            return Kron(outer, self.block)
        assert self.right is not None
        right = self.right if self.core is None else tucker_down(self.core, self.right)
        return Kron(outer, right, self.left)


def _split(shape: Shape, factor: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (u_p, v_p) and (u_q, v_q), the rows and the channels factorised within the bound `factor`."""
    factors = tuple(factor) if isinstance(factor, (tuple, list)) else (factor, factor)
    valid = len(factors) == 2 and all(isinstance(f, int) and (f == -1 or f > 0) for f in factors)
    require(valid, "lokr", "factor", factor, "a positive integer, -1, or a pair of them for (rows, channels)")
    return factorize(shape.rows, factors[0]), factorize(shape.channels, factors[1])


def _split_as(shape: Shape, outer: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (u_p, v_p) and (u_q, v_q) for an exact shape (u_p, u_q) of C."""
    sizes = (shape.rows, shape.channels)
    divides = all(u > 0 and size % u == 0 for u, size in zip(outer, sizes, strict=True))
    require(divides, "lokr", "outer", outer, f"divisors of {sizes}, the rows and channels of this weight")
    return (outer[0], sizes[0] // outer[0]), (outer[1], sizes[1] // outer[1])


def _scale(rank: int | None, alpha: float | None, full_scale: str) -> float:
    """Return γ."""
    if full_scale == "one":
        return 1.0
    require(rank is not None, "lokr", "rank", rank, "an integer, because full_scale='alpha/rank' divides by it")
    return rank_scale("lokr", rank or 1, alpha)
