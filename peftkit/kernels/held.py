"""A layer's output, kept for backward without keeping anything more than the next operation keeps anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


class Held:
    """A tensor to be read in backward, by someone who can do without it if it was written over by then.

    A function of autograd's that saves its own output fails in backward where a later operation wrote into it
    (`x += 1`, `ReLU(inplace=True)`). This is a node of its own beside it: saved as everything for backward is, so that
    checkpointing and offloading see it, and asked rather than relied on. Writes through `.data` are seen by nobody.
    """

    def __init__(self, tensor: Tensor) -> None:
        with torch.enable_grad():  # an alias of the memory and its version that leads back to no graph
            marker = cast("Callable[[Tensor], Tensor]", _Save.apply)(tensor.detach().requires_grad_())
        self._node, self._version = cast(Any, marker.grad_fn), tensor._version

    def value(self) -> Tensor | None:
        """The tensor, or None if it was written to since."""
        try:
            (tensor,) = self._node.saved_tensors
        except RuntimeError:  # autograd's own check of versions, which hooks of saved tensors turn off
            return None
        return tensor if tensor._version == self._version else None


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """Nothing depends on the marker."""
