"""What Triton's interpreter lacks: it holds bf16 as bare 16-bit integers and computes with those.

Products get real numbers, casts to bf16 round to nearest even, and any other arithmetic on bf16 raises: kernels widen
what they load before they compute.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_ARITHMETIC = ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_fneg", "create_fma")


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def repair() -> None:
    """Patch the interpreter of this process."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _wide(a), _wide(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded, target.scalar)
        if _is_bf16(source) and target.scalar == tl.float32:
            return _wide(source)
        return cast(self, source, target)

    def refused(name: str, original: Any) -> Any:
        def arithmetic(self: Any, *operands: Any) -> Any:
            if any(_is_bf16(operand) for operand in operands):
                raise TypeError(f"{name} on bf16: widen to fp32 first")
            return original(self, *operands)

        return arithmetic

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    for name in _ARITHMETIC:
        setattr(InterpreterBuilder, name, refused(name, getattr(InterpreterBuilder, name)))
