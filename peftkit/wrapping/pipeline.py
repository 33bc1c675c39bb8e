"""Pipelines, of diffusers and the like, as one model: their denoiser and text encoders under the pipeline's names.

All that the rest of the library knows of them is `of_models`, on functions whose first argument is a model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from torch import nn

from peftkit.errors import UnsupportedLayerError

P = ParamSpec("P")
Source = TypeVar("Source")
Result = TypeVar("Result")

#: the parts of a pipeline that are adapted; its VAE, safety checker and the like are not
_PART = re.compile(r"(unet|transformer|prior|decoder|text_encoder)(_\d+)?")
#: where a pipeline keeps the module of its parts, which remembers what was wrapped
_KEPT = "_peftkit_parts"


class Pipeline(Protocol):
    """What has models under names, as diffusers' pipelines do."""

    @property
    def components(self) -> Mapping[str, Any]: ...


def of_models(
    function: Callable[Concatenate[Source, P], Result],
) -> Callable[Concatenate[Source | Pipeline, P], Result]:
    """Make a function of a model take a pipeline too, and give it the module of the pipeline's parts."""
    call = cast("Callable[..., Result]", function)

    @functools.wraps(function)
    def resolved(*args: Any, **kwargs: Any) -> Result:
        if args:
            return call(as_module(args[0]), *args[1:], **kwargs)
        return call(**{name: as_module(value) for name, value in kwargs.items()})

    return cast("Callable[Concatenate[Source | Pipeline, P], Result]", resolved)


def as_module(model: Any) -> Any:
    """Return the module of a pipeline's parts, "unet", "text_encoder", …; anything that is no pipeline as it is.

    It is the same module at every call, with the parts that the pipeline has now.

    Raises:
        UnsupportedLayerError: the pipeline has no denoiser and no text encoder.
    """
    if isinstance(model, nn.Module) or not isinstance(found := getattr(model, "components", None), Mapping):
        return model
    parts = {n: m for n, m in found.items() if isinstance(m, nn.Module) and _PART.fullmatch(n)}
    if not parts:
        raise UnsupportedLayerError(
            f"{type(model).__name__} has {', '.join(found) or 'no components'}, and a unet, transformer, prior, "
            "decoder or text_encoder was expected: wrap the model itself"
        )
    root = vars(model).setdefault(_KEPT, _Parts())
    for name in [*root._modules]:
        del root._modules[name]
    for name, module in parts.items():
        root.add_module(name, module)
    return root


class _Parts(nn.Module):
    """The parts of a pipeline under its names for them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedLayerError(
            "a pipeline runs its parts one after another, and is not called with a batch: check its parts, as pipe.unet"
        )


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a pipeline, or of a ModuleDict under a pipeline's names for them; none of another model."""
    parts = {name: child for name, child in model.named_children() if _PART.fullmatch(name)}
    of_a_pipeline = isinstance(model, (_Parts, nn.ModuleDict)) and len(parts) == len([*model.children()])
    return parts if of_a_pipeline else {}


def part_of(name: str) -> str:
    """Return the part of a pipeline that a weight's name begins with, "" where it begins with none."""
    first, dot, _ = name.partition(".")
    return first if dot and _PART.fullmatch(first) else ""
