"""Whether a kernel or its torch reference runs."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from peftkit.errors import OptionError

BACKENDS = ("auto", "torch", "triton")
#: with larger ranks, a tile of every factor no longer fits into the registers of one program
LARGEST_RANK = 128

_log = logging.getLogger("peftkit.kernels")
_backend: ContextVar[str] = ContextVar("peftkit.kernels", default="auto")
_failed: set[str] = set()


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Inside, "torch" runs no kernel, and "triton" runs them or raises; "auto" is the rule outside.

    By itself a kernel runs on NVIDIA GPUs from compute capability 8.0 on and on AMD ones, for ranks up to 128; one that
    fails to compile or to launch is replaced by its reference for the rest of the process, with one line in the log.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend={backend!r} was given, one of {', '.join(map(repr, BACKENDS))} was expected")
    if backend == "triton" and not installed():
        raise OptionError('backend="triton" was given, but Triton is not installed: pip install "peftkit[triton]"')
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


@functools.cache
def installed() -> bool:
    """Whether Triton is there; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(factors: Sequence[Tensor], rank: int, *, backward: bool = False) -> bool:
    """Whether a kernel may run on these factors."""
    if _backend.get() == "torch" or not installed() or rank > LARGEST_RANK:
        return False
    if any(factor.dtype.itemsize not in (2, 4) or not factor.dtype.is_floating_point for factor in factors):
        return False
    if interpreted():
        return True
    device = factors[0].device
    if device.type != "cuda" or any(factor.device != device for factor in factors):
        return False
    if torch.version.hip is not None:
        return not backward  # its registers spill
    return torch.cuda.get_device_capability(device) >= (8, 0)


_Result = TypeVar("_Result", Tensor, list[Tensor])


def run(name: str, kernel: Callable[[], _Result], reference: Callable[[], _Result]) -> _Result:
    """What the kernel returns; what the reference does once the kernel has failed."""
    if _backend.get() == "triton":
        return kernel()
    if name in _failed:
        return reference()
    from triton.errors import TritonError

    try:
        return kernel()
    except (RuntimeError, TritonError) as error:
        _failed.add(name)
        _log.warning("the Triton kernel of %s failed, torch takes its place: %s", name, error)
        return reference()
