"""GLAD: a gradient that does not go against that of the sharpest point nearby."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.errors import OptionError, require_number
from peftkit.training.recipes.pairs import wide
from peftkit.training.recipes.recipe import Recipe
from peftkit.wrapping.pipeline import as_module


class GLAD(Recipe):
    r"""GLAD: what of a gradient goes against the gradient of the sharpest point nearby is left out of it.

    With g, the gradient of all adapters at their parameters θ, and g_s, that at θ + ρ·g/‖g‖: where ⟨g, g_s⟩ < 0, g
    becomes g − ⟨g, g_s⟩/‖g_s‖²·g_s. The parameters are those before, bit for bit, after the second pass. It takes two
    backward passes a step. Processes whose gradients are averaged need nothing more: all is a function of gradients.

    A step needs the second pass: in the block `perturbed`, or by a closure, which is called twice.

    Experimental: a reading of https://arxiv.org/abs/2507.13089, which has the gradient of sharpness-aware minimisation
    as a reference; the rule that joins the two is taken from descriptions of the paper.

    Args:
        model: a wrapped model.
        rho: ρ, 0.05 by default.
        name: of one adapter; by default all. The gradients of other parameters stay those of the first pass.

    Raises:
        OptionError: ρ is not above 0; or, at a step, there was no second pass.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        >>> rule = pk.training.GLAD(model)
        >>> handle = rule.attach(optimizer)
        >>> x = torch.randn(4, 8)
        >>> model(x).square().mean().backward()
        >>> with rule.perturbed():
        ...     model(x).square().mean().backward()
        >>> optimizer.step()
    """

    wanted: ClassVar[str] = "parameters"

    def __init__(self, model: nn.Module, rho: float = 0.05, *, name: str | None = None) -> None:
        require_number("rho", rho, positive=True)
        super().__init__(model, name=name)
        self.rho, self._model, self._steered = rho, as_module(model), False

    def takes(self, adapter: Adapter) -> bool:
        return any(True for _ in adapter.parameters())

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Run a second backward pass, of the same loss, at the perturbed parameters; then join the gradients.

        All of the batch goes through it, in as many parts as before, and scaled as before.

        Raises:
            OptionError: there was no first backward pass.
        """
        # copies, since a gradient may be a view of what the next backward pass writes to
        held = {p: None if p.grad is None else p.grad.clone() for p in self._model.parameters() if p.requires_grad}
        of_rule = dict.fromkeys(p for part in self.parts.values() for p in part.adapter.parameters())
        moved = {p: g for p in of_rule if (g := held.get(p)) is not None}
        if not moved:
            raise OptionError("GLAD: the adapters have no gradients: call backward before `with rule.perturbed():`")
        own, first, start = [*moved], [*moved.values()], [p.detach().clone() for p in moved]
        size = math.sqrt(_dot(first, first))
        try:
            with torch.no_grad():
                for parameter, g in zip(own, first, strict=True):
                    parameter.add_(g, alpha=self.rho / size if size else 0.0)
            for parameter in held:
                parameter.grad = None
            yield
            second = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            _steer_(first, second)
            self._steered = True
        finally:
            with torch.no_grad():
                for parameter, before in zip(own, start, strict=True):
                    parameter.copy_(before)
            for parameter, g in held.items():
                parameter.grad = g

    def before_step(self, optimizer: Optimizer) -> None:
        del optimizer
        if not self._steered:
            raise OptionError(
                "GLAD: a step came without the second backward pass: run it in `with rule.perturbed():`, or give the "
                "step a closure"
            )

    def after_step(self, optimizer: Optimizer) -> None:
        del optimizer
        self._steered = False

    def evaluated(self, closure: Callable[[], Any], optimizer: Optimizer) -> Any:
        loss = closure()
        with self.perturbed():
            closure()
        self.before_step(optimizer)
        return loss


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product of two lists of tensors, fetched from their devices together."""
    products = [torch.dot(x.flatten().to(wide(x)), y.flatten().to(wide(y))) for x, y in zip(a, b, strict=True)]
    return float(torch.stack([product.to(products[0].device) for product in products]).sum())


def _steer_(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """Take out of gradients, in place, what goes against a reference."""
    along = _dot(gradients, reference)
    if along < 0:
        share = along / _dot(reference, reference)
        for gradient, other in zip(gradients, reference, strict=True):
            gradient.sub_(other, alpha=share)
