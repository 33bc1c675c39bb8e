"""Operators on the factors of a Hadamard product, each run by a Triton kernel where one serves, else by its reference.

The reference (`references`) says what the operator means: it runs on the CPU and wherever no kernel serves, tells
torch.compile the shapes, and is what the kernel (`triton.launch`) is tested against.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from peftkit import kernels
from peftkit.errors import OptionError
from peftkit.kernels import references

_log = logging.getLogger("peftkit.kernels")
_library = torch.library.Library("peftkit", "DEF")
_failed: dict[str, str] = {}


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


hadamard = _operator("hadamard(Tensor? base, Tensor[] factors, float scale) -> Tensor", references.hadamard)
hadamard_moments = _operator("hadamard_moments(Tensor base, Tensor[] factors) -> Tensor", references.hadamard_moments)
hadamard_backward = _operator(
    "hadamard_backward(Tensor gradient, Tensor[] factors, float scale) -> Tensor[]", references.hadamard_backward
)


class _Hadamard(torch.autograd.Function):
    """base + scale·(B1·A1) ⊙ (B2·A2), which keeps the factors for backward and nothing of the size of ΔW."""

    @staticmethod
    def forward(ctx: Any, base: Tensor | None, scale: float, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        ctx.scale = scale
        return hadamard(base, factors, scale)

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


def differentiable_hadamard(base: Tensor | None, factors: Sequence[Tensor], scale: float) -> Tensor:
    """Return base + scale·(B1·A1) ⊙ (B2·A2), (m, n), in the dtype of base or of the factors, with gradients.

    Args:
        base: (m, n), or None for 0.
        factors: B1 (m, r), A1 (r, n), B2 (m, r), A2 (r, n).
        scale: a number, which gets no gradient.
    """
    return _Hadamard.apply(base, scale, *factors)  # type: ignore[return-value]
