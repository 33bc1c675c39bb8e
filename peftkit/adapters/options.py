"""Options of adapters: checks that name the adapter and what was expected, scales, and starting values."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor, nn

from peftkit.errors import OptionError, require_choice
from peftkit.geometry import Shape
from peftkit.kernels.blocks import accumulation_dtype


class Factory(TypedDict):
    """Keyword arguments of the functions that make tensors."""

    device: torch.device
    dtype: torch.dtype


def factory(weight: Tensor) -> Factory:
    """Return the device and dtype of an adapter's parameters: the weight's own, in at least fp32.

    Example:
        >>> from peftkit.adapters import factory
        >>> torch.zeros(4, 2, **factory(torch.zeros(4, 8, dtype=torch.bfloat16))).dtype
        torch.float32
    """
    return {"device": weight.device, "dtype": accumulation_dtype(weight.dtype)}


def rank_scale(kind: str, rank: int, alpha: float | None, rslora: bool = False) -> float:
    """Return γ = α/r, or α/√r for rank-stabilised LoRA (https://arxiv.org/abs/2312.03732). α defaults to r."""
    alpha = rank if alpha is None else alpha
    require(math.isfinite(alpha), kind, "alpha", alpha, "a finite number")
    return alpha / (math.sqrt(rank) if rslora else rank)


def times(scale: float, factor: Tensor) -> Tensor:
    """Return scale·factor, and the factor itself where the scale is 1."""
    return factor if scale == 1 else scale * factor


def require(condition: bool, kind: str, option: str, value: object, expected: str) -> None:
    """Raise an OptionError that names the adapter, the option, what came and what was expected."""
    if not condition:
        raise OptionError(f"{kind}: {option}={value!r} was given, {expected} was expected")


def require_dtype(dtype: torch.dtype | None) -> None:
    """Raise OptionError unless adapters and their files can be kept in it; None means a default."""
    require_choice("dtype", dtype, (None, torch.float16, torch.bfloat16, torch.float32, torch.float64))


def require_rank(kind: str, rank: object) -> None:
    """Raise OptionError unless the rank is a positive integer."""
    require(isinstance(rank, int) and not isinstance(rank, bool) and rank > 0, kind, "rank", rank, "a positive integer")


def limited_rank(kind: str, rank: int | None, default: int, limit: int, what: str) -> int:
    """Return the rank, by default the lesser of two; raise OptionError unless it is an integer from 1 to the limit.

    what: the limit is, for the message.
    """
    rank = min(default, limit) if rank is None else rank
    require_rank(kind, rank)
    require(rank <= limit, kind, "rank", rank, f"at most {limit}, {what}")
    return rank


def require_probability(kind: str, option: str, value: float) -> None:
    """Raise OptionError unless the value is in [0, 1)."""
    require(isinstance(value, (int, float)) and 0 <= value < 1, kind, option, value, "a probability in [0, 1)")


def misplaced(indices: Tensor, rows: int, columns: int) -> str:
    """Return why numbers (2, k) are no places of a matrix, each its own, "" where they are."""
    u, v = indices.long()
    within = bool(((u >= 0) & (u < rows) & (v >= 0) & (v < columns)).all())
    once = within and len(torch.unique(u * columns + v)) == len(u)
    return "" if once else f"indices: they are not {len(u)} different places of a {rows}×{columns} matrix"


def require_kernel(kind: str, shape: Shape) -> None:
    """Raise OptionError unless the kernel has several positions, which the core of Tucker factors runs over."""
    require(
        shape.positions > 1,
        kind,
        "tucker",
        True,
        f"a convolution with a kernel larger than 1 (this weight is {shape}; leave it out with `exclude`, "
        "or give it a Rule without tucker)",
    )


def uniform_fan_in_(tensor: Tensor, fan_in: int) -> Tensor:
    """Draw from U(−1/√fan_in, 1/√fan_in), as kaiming_uniform_(a=√5) does and as LoRA starts."""
    return nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
