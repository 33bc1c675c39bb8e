"""Adapter: parameters -> Delta. The whole contract of an algorithm."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from peftkit.adapters.form import Additive, Form
from peftkit.delta.base import Delta
from peftkit.errors import OptionError
from peftkit.geometry import Shape
from peftkit.kernels.blocks import accumulation_dtype


class Adapter(nn.Module, ABC):
    """An algorithm's parameters for one weight matrix W (m, n), and the ΔW they stand for.

    A subclass has an `__init__(self, shape, weight, *, options…)` that makes its parameters, and `delta`. It reads
    W but never keeps or writes it, and knows neither layers nor files. Laws: `delta` is zero after `__init__`;
    in eval mode it is a function of the parameters and W alone.
    """

    #: the name it is registered under
    kind: ClassVar[str] = ""
    #: where the algorithm is described
    paper: ClassVar[str] = ""
    #: what the stored numbers mean; changes with their meaning, so that an old file is refused, never misread
    convention: ClassVar[str] = "1"
    #: whether ΔW depends on the values of W when it is computed; without it, `delta` may be given W in any shape
    reads_base: ClassVar[bool] = False
    #: entries that hold what the base was when the adapter was made; a file without them is taken to be of this base
    from_base: ClassVar[tuple[str, ...]] = ()
    #: what the same file means on another base, for the error a user meets there
    on_another_base: ClassVar[str] = "adds the same ΔW"

    #: how files hold a ΔW of this kind's structure; None for kinds whose ΔW is of another kind's structure, or of none
    additive: ClassVar[type[Additive] | None] = None
    #: the tensors to which all of ΔW is proportional: times c, those that are there make it c·ΔW; none if ΔW is not so
    scaling_parameters: ClassVar[frozenset[str]] = frozenset()

    #: every option with its value, as `registry.build` resolved them
    options: dict[str, Any]
    #: probability of dropping an element of the layer's input before ΔW is applied to it
    input_dropout: float = 0.0
    #: whether `delta` draws random numbers in training
    stochastic: bool = False

    @abstractmethod
    def delta(self, weight: Tensor) -> Delta:
        """ΔW at strength 1. weight: W (m, n), read only."""

    def at(self, weight: Tensor, strength: float | Tensor) -> Delta:
        """ΔW at a strength λ: λ·ΔW, unless the algorithm offers another path and was asked for it by name."""
        delta = self.delta(weight)
        return delta if isinstance(strength, float) and strength == 1 else delta.scaled(strength)

    def forward(self, weight: Tensor, strength: float | Tensor) -> Delta:
        """`at`, in the precision of the parameters whatever the autocast state."""
        if torch.is_autocast_enabled(weight.device.type):
            with torch.autocast(weight.device.type, enabled=False):
                return self.at(weight, strength)
        return self.at(weight, strength)

    @classmethod
    def row_parameters(cls, options: Mapping[str, Any]) -> frozenset[str] | None:
        """The tensors that have a row for every row of W, where row i of ΔW needs no other row; None if it does.

        Args:
            options: as in `Stored`.
        """
        del options
        return None

    @classmethod
    def of_rows(cls, stored: Stored, shape: Shape, rows: Tensor) -> Stored | None:
        """Take the adapter of some rows of W, with the same ΔW row by row; None where the algorithm mixes rows.

        Args:
            stored: the adapter of the whole W.
            shape: of W.
            rows: (k,) the numbers of the rows.
        """
        del shape
        by_row = cls.row_parameters(stored.options)
        if by_row is None:
            return None
        tensors = {key: t[rows] if key in by_row else t.clone() for key, t in stored.tensors.items()}
        return stored._replace(tensors=tensors)

    def project_(self) -> None:
        """Move the parameters, in place, into the set the algorithm allows. Most algorithms allow everything."""

    def rebase_(self, weight: Tensor) -> None:
        """Recompute what is derived from W, after parameters and buffers came from a file."""
        del weight

    def derived(self) -> dict[str, Tensor]:
        """What `rebase_` would recompute: with it, a file needs no base to say what ΔW is."""
        return {}

    def form(self, weight: Tensor) -> Form | None:
        """Return what files of other programs hold of an adapter that reads its base; None where they hold none of it.

        weight: (m, n), of the right shape and device; its numbers are not read.
        """
        del weight
        return None

    @classmethod
    def structure(cls, options: Mapping[str, Any]) -> str:
        """Return what `Target.reads` calls the adapter that these options make, as it stands in a file."""
        return f"{cls.kind} tucker" if options.get("tucker") else cls.kind

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class Stored(NamedTuple):
    """An adapter as a file holds it: its kind, its options and its tensors as `state_dict` names them."""

    kind: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]


class Factory(TypedDict):
    device: torch.device
    dtype: torch.dtype


def factory(weight: Tensor) -> Factory:
    """Where and how an adapter of this weight keeps its parameters: its device, in at least fp32."""
    return {"device": weight.device, "dtype": accumulation_dtype(weight.dtype)}


def placeholder_weight(shape: Shape) -> Tensor:
    """A weight (m, n) for adapters that never look at it: one zero, seen everywhere."""
    return torch.zeros(()).expand(shape.rows, shape.columns)


def rank_scale(kind: str, rank: int, alpha: float | None, rslora: bool = False) -> float:
    """γ = α/r, or α/√r for rank-stabilised LoRA (https://arxiv.org/abs/2312.03732). α defaults to r."""
    alpha = rank if alpha is None else alpha
    require(math.isfinite(alpha), kind, "alpha", alpha, "a finite number")
    return alpha / (math.sqrt(rank) if rslora else rank)


def times(scale: float, factor: Tensor) -> Tensor:
    """scale·factor, and the factor itself where that is 1."""
    return factor if scale == 1 else scale * factor


def require(condition: bool, kind: str, option: str, value: object, expected: str) -> None:
    """Raise an OptionError that names the adapter, the option, what came and what was expected."""
    if not condition:
        raise OptionError(f"{kind}: {option}={value!r} was given, {expected} was expected")


def require_dtype(dtype: torch.dtype | None) -> None:
    """Raise OptionError unless adapters and their files can be kept in it; None means a default."""
    known = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if dtype not in known:
        raise OptionError(f"dtype={dtype!r} was given, one of {', '.join(str(d) for d in known)} was expected")


def require_rank(kind: str, rank: object) -> None:
    require(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0, kind, "rank", rank, "a positive integer")


def require_probability(kind: str, option: str, value: float) -> None:
    require(isinstance(value, (int, float)) and 0 <= value < 1, kind, option, value, "a probability in [0, 1)")


def require_kernel(kind: str, shape: Shape) -> None:
    """Tucker factors have a core over kernel positions, so there must be more than one."""
    require(
        shape.positions > 1,
        kind,
        "tucker",
        True,
        f"a convolution with a kernel larger than 1 (this weight is {shape}; leave it out with `exclude`, "
        "or give it a Rule without tucker)",
    )


def uniform_fan_in_(tensor: Tensor, fan_in: int) -> Tensor:
    """U(−1/√fan_in, 1/√fan_in), what kaiming_uniform_(a=√5) draws and what LoRA starts from."""
    return nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
