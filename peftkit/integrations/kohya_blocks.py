"""Blocks of a U-Net as sd-scripts counts them, and the learning rates and ranks that its network_args give them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from peftkit.errors import OptionError, require_option

_DIFFUSERS = re.compile(r"(down|up)_blocks\.(\d+)\.(attentions|resnets|upsamplers|downsamplers)\.(\d+)\.")
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.")

_CURVES: dict[str, Callable[[float], float]] = {
    "sine": lambda t: math.sin(math.pi * t / 2),
    "cosine": lambda t: math.sin(math.pi * (1 - t) / 2),
    "linear": lambda t: t,
    "reverse_linear": lambda t: 1 - t,
    "zeros": lambda t: 0.0,
}


class Layout(NamedTuple):
    """How many blocks go down, lie in the middle and go up, and how many come before and after them."""

    side: int
    middle: int
    ends: int

    @property
    def blocks(self) -> int:
        return 2 * self.side + self.middle + 2 * self.ends


SD, SDXL = Layout(12, 1, 0), Layout(9, 3, 1)


def block_of(path: str) -> int | None:
    """Return the number of the block that a module of a U-Net is in; None for modules of no block.

    Args:
        path: of the module in the U-Net, in diffusers' names (25 blocks) or the original network's (23 blocks, SDXL).
    """
    if found := _DIFFUSERS.match(path):
        way, block, what, at = found.groups()
        inside = 3 * int(block) + (2 if what.endswith("samplers") else int(at))
        return inside + (1 if way == "down" else SD.side + SD.middle)
    if path.startswith("mid_block."):
        return SD.side
    if found := _ORIGINAL.match(path):
        first = {"input_blocks": 1, "middle_block": 1 + SDXL.side, "output_blocks": 1 + SDXL.side + SDXL.middle}
        return first[found[1]] + int(found[2])
    return None


def block_rates(arguments: Mapping[str, str], layout: Layout) -> list[float] | None:
    """Return the factor of the learning rate for every block; None where no argument gives one.

    Args:
        arguments: down_lr_weight, mid_lr_weight and up_lr_weight, numbers separated by commas or the name of a curve
            ("cosine", "sine", "linear", "reverse_linear", "zeros", each with "+0.25" or the like behind it); and
            block_lr_zero_threshold, up to which a factor is 0.
        layout: of the U-Net.

    Raises:
        OptionError: a list of another length than the blocks, or what is no number and no curve.
    """
    names = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
    if not any(name in arguments for name in names):
        return None
    lengths = (layout.side, layout.middle, layout.side)
    least = number("block_lr_zero_threshold", arguments.get("block_lr_zero_threshold", "0"))
    factors = [
        factor for name, length in zip(names, lengths, strict=True) for factor in _rates(name, arguments, length)
    ]
    ends = [1.0] * layout.ends
    return [*ends, *(factor if factor > least else 0.0 for factor in factors), *ends]


def block_numbers(name: str, text: str, layout: Layout) -> list[float]:
    """Return a number for every block from an argument such as block_dims="4,4,8,…"."""
    numbers = [number(name, part) for part in text.split(",")]
    require_option(len(numbers) == layout.blocks, name, text, f"{layout.blocks} numbers, one for each block,")
    return numbers


def number(name: str, text: str | float) -> float:
    """Return the number that an argument says."""
    try:
        return float(text)
    except (TypeError, ValueError):
        raise OptionError(f"{name}={text!r} was given, a number was expected") from None


def _rates(name: str, arguments: Mapping[str, str], length: int) -> Sequence[float]:
    """The factors of one side, from its argument; 1 without one."""
    text = arguments.get(name)
    if text is None:
        return [1.0] * length
    curve, _, more = text.partition("+")
    if curve in _CURVES:
        least = number(name, more or "0")
        return [_CURVES[curve](i / max(1, length - 1)) + least for i in range(length)]
    factors = [number(name, part or "0") for part in text.split(",")]
    expected = f"{length} numbers for this U-Net, or one of {', '.join(_CURVES)}"
    require_option(len(factors) == length, name, text, expected)
    return factors
