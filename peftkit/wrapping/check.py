"""Find adapters that would never train, by one forward and one backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import NeverRanWarning, PeftkitError
from peftkit.kernels.torch_private import own_buffers
from peftkit.wrapping.installed import installed_adapters, names_of
from peftkit.wrapping.pipeline import of_models


class CheckError(PeftkitError, RuntimeError):
    """The model's output depends on no trainable parameter, or holds no floating point tensor."""


@dataclass(frozen=True)
class CheckReport:
    """Say which adapters take part in training, each as "<weight>[<name>]". str(report) lists those that do not.

    Attributes:
        ran: adapters that were called in forward.
        never_ran: adapters that were not.
        no_gradient: adapters that ran, and whose parameters got no gradient other than zero.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> print(pk.check(model, torch.randn(2, 8)))
        1 of 1 adapters ran and got a gradient
    """

    ran: tuple[str, ...]
    never_ran: tuple[str, ...]
    no_gradient: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every adapter ran and got a gradient."""
        return not self.never_ran and not self.no_gradient

    def __str__(self) -> str:
        total = len(self.ran) + len(self.never_ran)
        lines = [f"{len(self.ran) - len(self.no_gradient)} of {total} adapters ran and got a gradient"]
        lines += [f"  never ran: {item}" for item in self.never_ran]
        lines += [f"  ran, but got no gradient: {item}" for item in self.no_gradient]
        return "\n".join(lines)


@of_models
def check(
    model: nn.Module, batch: Any, *, loss: Callable[[Any], Tensor] | None = None, name: str | None = None
) -> CheckReport:
    """Run the model once forward and backward, and report the adapters that never ran or got no gradient.

    Gradients, buffers and the random state are put back.

    Args:
        model: a wrapped model.
        batch: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        loss: of the model's output; by default the sum of squares of all its floating point tensors.
        name: of one adapter; by default all.

    Returns:
        The report; `ok` is True where every adapter ran and got a gradient.

    Raises:
        UnknownAdapterError: there is no adapter of that name, or none at all.
        CheckError: the output has no floating point tensor, or depends on no trainable parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> pk.check(model, torch.randn(2, 8)).ok
        True
    """
    watched = [(f"{at.site}[{at.name}]", at.adapter) for at in installed_adapters(model, names_of(model, name))]
    ran: set[int] = set()
    hooks = [a.register_forward_hook(lambda module, *_: ran.add(id(module))) for _, a in watched]
    try:
        with _left_as_it_is(model), warnings.catch_warnings():
            warnings.simplefilter("ignore", NeverRanWarning)  # the report says it
            output = _call(model, batch)
            value = _squares(output) if loss is None else loss(output)
            if not value.requires_grad:
                raise CheckError(
                    "the loss depends on no trainable parameter: no adapter acts on this output "
                    "(all disabled, at strength 0, merged, or never called)"
                )
            value.backward()
            got = {id(a) for _, a in watched if any(p.grad is not None and p.grad.any() for p in a.parameters())}
    finally:
        for hook in hooks:
            hook.remove()
    return CheckReport(
        tuple(label for label, a in watched if id(a) in ran),
        tuple(label for label, a in watched if id(a) not in ran),
        tuple(label for label, a in watched if id(a) in ran and id(a) not in got),
    )


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Make a block with gradients, without old ones, that leaves gradients, buffers and random state as they were."""
    gradients = {p: p.grad for p in model.parameters()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in own_buffers(module).items()
        if buffer is not None
    ]
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                own_buffers(module)[name] = buffer.copy_(before)


def _call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a tensor, positional arguments or keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _squares(output: Any) -> Tensor:
    tensors = list(_tensors(output))
    if not tensors:
        raise CheckError(f"the model's output, a {type(output).__name__}, holds no floating point tensor: pass loss=")
    return torch.stack([t.float().square().sum() for t in tensors]).sum()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
