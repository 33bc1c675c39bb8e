"""The base model as a loader sees it: its own module names and fused weights, and the way back to canonical names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import dit_names, unet_names
from .dit_names import Place

CORES = ("unet", "transformer")  # the component that denoises
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
FAMILIES = (*unet_names.UNETS, *dit_names.TABLES)


@dataclass
class Module:
    """One module of the loader's model: its parts in row order, by canonical name."""

    parts: dict[int, tuple[str, Tensor, bool]] = field(default_factory=dict)
    count: int = 1
    sliced: bool = False  # a row slice of a fused weight, or one with a function
    turned: bool = False  # what is added to the weight gets its halves exchanged first

    @property
    def weight(self) -> Tensor:
        """The whole weight, float64. A fused one needs all its parts among the weights passed to the reader."""
        if len(self.parts) != self.count:
            names = [name for name, _, _ in self.parts.values()]
            raise ValueError(f"the file names a fused weight of {self.count} parts; the base holds only {names}")
        return torch.cat([turn(weight.to(torch.float64), swap) for _, (_, weight, swap) in sorted(self.parts.items())])

    @property
    def name(self) -> str:
        """The canonical name of the first part."""
        return self.parts[min(self.parts)][0]

    def split(self, delta: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The rows of `delta` by canonical name."""
        ordered = [part for _, part in sorted(self.parts.items())]
        rows = torch.split(delta, [weight.shape[0] for _, weight, _ in ordered])
        for (name, _, swap), piece in zip(ordered, rows, strict=True):
            yield name, turn(piece, swap)


def turn(rows: Tensor, swap: bool) -> Tensor:
    """The two halves of the rows, exchanged."""
    return torch.cat(rows.chunk(2)[::-1]) if swap else rows


def component(name: str) -> tuple[str, str]:
    """unet.conv_in -> (unet, conv_in)."""
    head, _, path = name.partition(".")
    return head, path


def base_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the optional `<module>.bias` entries."""
    return {name: weight for name, weight in weights.items() if not name.endswith(".bias")}


def split_components(weights: Mapping[str, Tensor], family: str | None) -> dict[str, dict[str, Tensor]]:
    """Component -> {path in it: weight}. A generic model has none."""
    if family is None:
        return {}
    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: expected None or one of {FAMILIES}")
    split: dict[str, dict[str, Tensor]] = {}
    for name, weight in base_weights(weights).items():
        head, path = component(name)
        if head not in (*CORES, *TEXT):
            raise ValueError(f"{name}: a name of family {family!r} starts with one of {(*CORES, *TEXT)}")
        split.setdefault(head, {})[path] = weight
    return split


def as_is(paths: Mapping[str, Tensor], prefix: str = "") -> dict[str, Module]:
    """Every path a module of its own; prefix + path is its canonical name."""
    return {path: Module({0: (prefix + path, weight, False)}) for path, weight in paths.items()}


def core_places(components: Mapping[str, Mapping[str, Tensor]], family: str | None) -> dict[str, Place]:
    """Diffusers path of each module of the denoiser -> its place in the model's own (ldm) layout."""
    if family is None:
        return {}
    paths = [path for core in CORES for path in components.get(core, {})]
    if family in unet_names.UNETS:
        return {path: Place(unet_names.to_ldm(path, family)) for path in paths}
    shapes = {path: tuple(weight.shape) for core in CORES for path, weight in components.get(core, {}).items()}
    return {path: place for path in paths if (place := dit_names.place(path, family, shapes[path]))}


def ldm_core(components: Mapping[str, Mapping[str, Tensor]], family: str | None) -> dict[str, Module]:
    """The denoiser in the model's own names, with q, k, v (and mlp) fused where the model fuses them."""
    modules: dict[str, Module] = {}
    places = core_places(components, family)
    for core in CORES:
        for path, weight in components.get(core, {}).items():
            if path not in places:
                continue
            place = places[path]
            module = modules.setdefault(place.module, Module(count=place.parts))
            module.parts[place.part] = (f"{core}.{path}", weight, place.swapped)
    return modules


def own_core(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Module]:
    """The denoiser in diffusers' names."""
    return {path: module for core in CORES for path, module in as_is(components.get(core, {}), f"{core}.").items()}


def text_encoder(components: Mapping[str, Mapping[str, Tensor]], name: str) -> dict[str, Module]:
    """A text encoder in transformers' names; CLIP's start with text_model or text_projection in every file."""
    modules = as_is(components.get(name, {}), f"{name}.")
    return {_clip(path): module for path, module in modules.items()}


def _clip(path: str) -> str:
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else path


def named(prefix: str, modules: Mapping[str, Module], spell: Callable[[str], str] | None = None) -> dict[str, Module]:
    """Names a file may use: prefix + path, with "_" for "." unless `spell` says otherwise."""
    return {prefix + (spell or underscored)(path): module for path, module in modules.items()}


def underscored(path: str) -> str:
    return path.replace(".", "_")


def dotted(path: str) -> str:
    return path
