"""Three operators on the factors of ΔW (m, n), each with a reference in plain PyTorch.

The reference is what the operator means: its implementation on the CPU and wherever no kernel serves, what
torch.compile learns shapes from, and what the kernel in `triton` is held against. `structure` is the name of a class
in peftkit.delta and `factors` the tensors it is made of, both from `Delta.tiled`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from peftkit import kernels
from peftkit.delta.base import Delta
from peftkit.errors import OptionError
from peftkit.kernels.blocks import BLOCK, accumulation_dtype, row_blocks

_log = logging.getLogger("peftkit.kernels")
_library = torch.library.Library("peftkit", "DEF")
_failed: dict[str, str] = {}


def change(structure: str, factors: Sequence[Tensor]) -> Delta:
    """The ΔW of that structure, with its factors in at least fp32."""
    return getattr(import_module("peftkit.delta"), structure)(*factors).upcast()


def _delta(base: Tensor | None, structure: str, factors: list[Tensor], scale: float, row: Tensor | None) -> Tensor:
    """(base + scale·ΔW)·row, rounded once to base's dtype, or the factors'. base (m, n) or None, row (m,) or None."""
    of = change(structure, factors)
    out = torch.empty(of.shape, dtype=(factors[0] if base is None else base).dtype, device=factors[0].device)
    for block in _blocks(of):
        rows = of.rows(block)
        if scale != 1:
            rows = rows * scale
        if base is not None:
            rows = rows + base[block].to(accumulation_dtype(base.dtype))
        out[block] = rows if row is None else rows * row[block, None]
    return out


def _moments(base: Tensor, structure: str, factors: list[Tensor]) -> Tensor:
    """Per row Σ_j base_ij·ΔW_ij and Σ_j ΔW_ij², (2, m), in at least fp32. base (m, n)."""
    return torch.stack(Delta.moments(change(structure, factors), base))


def _hadamard_backward(gradient: Tensor, factors: list[Tensor], scale: float) -> list[Tensor]:
    """The gradients of the factors B1, A1, B2, A2 of scale·(B1·A1) ⊙ (B2·A2) at `gradient` G (m, n):

    dB1 = (scale·G ⊙ (B2·A2))·A1ᵀ and dA1 = B1ᵀ·(scale·G ⊙ (B2·A2)), and likewise with 1 and 2 exchanged.
    """
    B1, A1, B2, A2 = (factor.to(accumulation_dtype(factor.dtype)) for factor in factors)
    dB1, dB2, dA1, dA2 = (torch.zeros(factor.shape, dtype=B1.dtype, device=B1.device) for factor in (B1, B2, A1, A2))
    for block in _blocks(change("Hadamard", factors)):
        upstream = gradient[block].to(B1.dtype)
        of1, of2 = (B2[block] @ A2).mul_(upstream), (B1[block] @ A1).mul_(upstream)
        torch.mm(of1, A1.mT, out=dB1[block])
        torch.mm(of2, A2.mT, out=dB2[block])
        dA1.addmm_(B1[block].mT, of1)
        dA2.addmm_(B2[block].mT, of2)
    return [(scale * result).to(factor.dtype) for result, factor in zip((dB1, dA1, dB2, dA2), factors, strict=True)]


def _blocks(of: Delta) -> Iterator[slice]:
    """Rows that a reference works on at once: what a cache holds, or on a GPU, what is worth its launches."""
    return row_blocks(*of.shape, of.row_multiple, BLOCK if of.device.type == "cpu" else 16 * BLOCK)


def _operator(schema: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Register torch.ops.peftkit.<name> with its reference, and for a GPU the launch of the same name."""
    name = schema.partition("(")[0]

    def plain(*arguments: Any) -> Any:
        device = _factors(arguments)[0].device.type
        # backward may be called within autocast, which would round what is here to be exact
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return reference(*arguments)

    def with_kernel(*arguments: Any) -> Any:
        others = [argument for argument in arguments if isinstance(argument, Tensor)]
        why = _failed.get(name) or kernels.refusal(name, _factors(arguments), others)
        if why is None:
            launch = import_module("peftkit.kernels.triton.launch")
            try:
                return getattr(launch, name)(*arguments)
            except torch.cuda.OutOfMemoryError:
                raise
            except launch.FAILURES as error:
                if kernels.forced():
                    raise
                _failed[name] = f"its kernel failed before: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                _log.warning("%s runs in plain PyTorch from now on: %s", name, _failed[name])
        elif kernels.forced():
            raise OptionError(f"kernels.use('triton'): {name} cannot run there, {why}")
        return plain(*arguments)

    _library.define(schema)
    _library.impl(name, plain, "CompositeExplicitAutograd")
    _library.impl(name, with_kernel, "CPU" if kernels.INTERPRETED else "CUDA")
    torch.library.register_fake(f"peftkit::{name}", plain, lib=_library)
    return getattr(torch.ops.peftkit, name).default


def _factors(arguments: Sequence[Any]) -> list[Tensor]:
    """The one list among an operator's arguments."""
    return next(argument for argument in arguments if isinstance(argument, list))


delta = _operator(
    "delta(Tensor? base, str structure, Tensor[] factors, float scale, Tensor? row) -> Tensor",
    _delta,
)
moments = _operator("moments(Tensor base, str structure, Tensor[] factors) -> Tensor", _moments)
hadamard_backward = _operator(
    "hadamard_backward(Tensor gradient, Tensor[] factors, float scale) -> Tensor[]",
    _hadamard_backward,
)


class _Hadamard(torch.autograd.Function):
    """base + scale·(B1·A1) ⊙ (B2·A2), which keeps the factors for backward and nothing of the size of ΔW."""

    @staticmethod
    def forward(ctx: Any, base: Tensor | None, scale: float, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        ctx.scale = scale
        return delta(base, "Hadamard", factors, scale, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factors, needed = ctx.saved_tensors, ctx.needs_input_grad
        gradients: Sequence[Tensor | None] = [None] * 4
        if torch.is_grad_enabled():  # for a second derivative, which the operator does not have
            B1, A1, B2, A2 = factors
            upstream = ctx.scale * gradient.to(B1.dtype)
            of1, of2 = upstream * (B2 @ A2), upstream * (B1 @ A1)
            gradients = of1 @ A1.mT, B1.mT @ of1, of2 @ A2.mT, B2.mT @ of2
        elif any(needed[2:]):
            gradients = hadamard_backward(gradient, factors, ctx.scale)
        return gradient if needed[0] else None, None, *gradients


def hadamard(base: Tensor | None, factors: Sequence[Tensor], scale: float) -> Tensor:
    """base + scale·(B1·A1) ⊙ (B2·A2) in base's dtype, or the factors'. base (m, n) or None."""
    return _Hadamard.apply(base, scale, *factors)  # type: ignore[return-value]
