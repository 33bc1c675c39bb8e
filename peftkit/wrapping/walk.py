"""The modules of a model by name, without adapters and without the wrappers that torch has put around modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peftkit.kernels.torch_private import own_modules, wrapped


def dotted(*names: str) -> str:
    """Join names by dots, leaving out the root's, which is empty."""
    return ".".join(name for name in names if name)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all of torch's wrappers around it; the module itself where there is none."""
    while (inside := wrapped(module)) is not None:
        module = inside[1]
    return module


def named_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's modules by name, in order, without adapters and what is inside them.

    The module inside a wrapper of torch (torch.compile, DistributedDataParallel, AveragedModel, checkpoint_wrapper, …)
    comes under the wrapper's own name, and the wrapper does not come at all: names are the same with and without it.

    Args:
        model: with or without adapters.
        every_name: a module in several places comes under each of its names, not just the first.
    """
    yield from _below("", model, None if every_name else set())


def _below(name: str, module: nn.Module, seen: set[int] | None) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    yield name, module
    adapted = "adapter_state" in module.__dict__
    for child_name, child in own_modules(module).items():
        if child is not None and not (adapted and child_name == "adapters"):
            yield from _below(dotted(name, child_name), child, seen)


def plain_name(model: nn.Module, name: str) -> str:
    """Return the name of a tensor or a module, as torch gives it, without the segments of wrappers."""
    module: nn.Module | None = model
    kept: list[str] = []
    for segment in name.split("."):
        while module is not None and (inside := wrapped(module)) is not None and segment != inside[0]:
            module = inside[1]  # a wrapper that leaves its segment out of the state dict
        if module is None or wrapped(module) is None:
            kept.append(segment)
        module = None if module is None else own_modules(module).get(segment)
    return ".".join(kept)
