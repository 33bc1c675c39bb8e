"""Make ΔW from its factors on a GPU: by Triton kernels where they serve, else in plain PyTorch.

    with peftkit.kernels.use("torch"): ...

May import errors only; takes tensors, returns tensors, and knows no layer, ΔW or adapter. Nothing needs Triton before a
kernel first runs. Public: `use`. The operators are in `operators`, what they mean in `references`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from peftkit.errors import OptionError, require_choice

CHOICES = ("auto", "torch", "triton")

#: Triton runs kernels on the CPU, number by number, if this was set before it was imported; tests do
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: beyond these the products outweigh what a kernel saves, and the backward, which holds every rank at once, spills: of
#: 32-bit factors of rank 64, 275 instructions on sm_90 and 1729 on sm_80, where up to rank 32 there are none
MAX_RANK, MAX_RANK_BACKWARD_32_BIT = 128, 32

# Not a context variable: autograd runs backward in threads of its own
_choice = "auto"


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Choose within the block whether ΔW is made by Triton kernels.

    The choice holds for the whole process, threads included. Blocks nest.

    Args:
        choice: "auto" runs a kernel where one serves, "torch" runs none, "triton" raises where tensors of a GPU get
            none.

    Raises:
        OptionError: The choice is unknown, or Triton cannot run here.

    Example:
        >>> from peftkit import kernels
        >>> with kernels.use("torch"):
        ...     x = pk.delta.Hadamard(*(torch.ones(2, 2) for _ in range(4))).dense()
    """
    global _choice
    require_choice("choice", choice, CHOICES)
    if choice == "triton" and (why := _missing()):
        raise OptionError(f"kernels.use('triton'): {why}. Use 'auto', which takes plain PyTorch here")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def forced() -> bool:
    """Return whether `use("triton")` is in force."""
    return _choice == "triton"


def refusal(operator: str, factors: Sequence[Tensor], others: Sequence[Tensor]) -> str | None:
    """Return why no kernel serves these tensors, None if one does.

    Args:
        operator: The operator's name.
        factors: The factors of ΔW.
        others: Tensors that the operator reads beside the factors.
    """
    if _choice == "torch":
        return "kernels.use('torch') is in force"
    device = factors[0].device
    if why := _missing() or _unfit(device, operator):
        return why
    if len({t.dtype for t in factors}) > 1:
        return "the factors are in different dtypes"
    for t in (*factors, *others):
        if t.device != device:
            return f"tensors are on {device} and {t.device}"
        if not t.is_floating_point() or t.itemsize not in (2, 4):
            return f"{t.dtype} is not a float of 16 or 32 bits"
        if max(t.stride()) >= 1 << 24:
            return "a stride of 2²⁴ or more overflows the 32-bit offsets within a tile"
    wide_backward = operator == "hadamard_backward" and factors[0].itemsize == 4
    most, rank = MAX_RANK_BACKWARD_32_BIT if wide_backward else MAX_RANK, factors[0].shape[1]
    return f"rank {rank} is above {most}" if rank > most else None


@functools.cache
def _missing() -> str | None:
    """What this machine lacks to run a kernel."""
    if not INTERPRETED and not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    try:
        importlib.import_module("peftkit.kernels.triton.launch")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'peftkit[triton]'"
    return None


@functools.cache
def _unfit(device: torch.device, operator: str) -> str | None:
    """What a device lacks to run an operator's kernel."""
    if INTERPRETED:
        return None
    if torch.version.hip is not None:
        return "the backward kernel spills on AMD" if operator == "hadamard_backward" else None
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"sm_{capability[0]}{capability[1]} is below sm_80"
