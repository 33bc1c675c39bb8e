"""The model families in small, and their checkpoints in both layouts.

They are the library's own with small weights under the genuine names: it tells a checkpoint by names and shapes, and
real shapes are large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from peftkit.files.families import names
from peftkit.files.families.encoders import clip, open_clip
from peftkit.files.families.models.flux import flux
from peftkit.files.families.models.stable_diffusion import unet
from peftkit.files.families.models.stable_diffusion_3 import sd3
from peftkit.files.families.module import Component, ModuleSpec
from peftkit.files.families.names import FAMILIES, Family
from tests.support.files import State

#: columns of every matrix of the small Flux: its rows are the real ones, which diffusers' converter has written in it
FLUX_COLUMNS = 4


def _small_clip(build: Callable[..., Iterable[ModuleSpec]], width: int, projected: bool = False) -> list[ModuleSpec]:
    small = {49408: 64}
    return [replace(m, shape=tuple(small.get(n, n) for n in m.shape)) for m in build(width, projected=projected)]


def _small_flux() -> list[ModuleSpec]:
    modules = []
    for module in flux():
        shape = module.shape if len(module.shape) < 2 else (module.shape[0], FLUX_COLUMNS)
        modules.append(replace(module, shape=shape))
    return modules


def _built(part: Component, build: Callable[[], Iterable[ModuleSpec]]) -> Component:
    depth = 2 if part.name.startswith("text_encoder") else 1
    return replace(part, build=lambda: iter(build()), depths=dict.fromkeys(part.depths, depth))


def _family(name: str, *builds: Callable[[], Iterable[ModuleSpec]]) -> Family:
    parts = FAMILIES[name].parts[: len(builds)]
    return replace(FAMILIES[name], parts=tuple(map(_built, parts, builds)))


@cache
def small_families() -> dict[str, Family]:
    """SD 1.5 and its text encoder, SDXL and both of its, SD 3.5 with normed and dual attention, Flux."""
    unet15 = partial(unet, (32, 64, 64), (1, 1, 0), middle=1, context=24, linear=False)
    unet_xl = partial(unet, (32, 64), (0, 1), middle=1, context=40, linear=True, added=48)
    return {
        "sd15": _family("sd15", unet15, partial(_small_clip, clip, 24)),
        "sdxl": _family(
            "sdxl", unet_xl, partial(_small_clip, clip, 16), partial(_small_clip, open_clip, 32, projected=True)
        ),
        "sd35-medium": _family("sd35-medium", partial(sd3, 2, normed=True, dual=1)),
        "flux": _family("flux", _small_flux),
    }


def use_small_families(monkeypatch: Any) -> dict[str, Family]:
    monkeypatch.setattr(names, "FAMILIES", small_families())
    return small_families()


def diffusers_state(family: Family, dtype: torch.dtype = torch.float32, component: str | None = None) -> State:
    """Random weights under diffusers' names, with the component before each unless one is asked for."""
    found: State = {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 2).to(dtype)

    for module in family.modules.values():
        own, _, path = module.name.partition(".")
        if component not in (None, own):
            continue
        name = module.name if component is None else path
        found[f"{name}.weight"] = random(*module.shape)
        if module.bias:
            found[f"{name}.bias"] = random(module.shape[0])
    return found


def original_state(family: Family, theirs: Mapping[str, Tensor]) -> State:
    """The same weights under the names and in the rows of the published file. theirs: of all components."""
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for module in family.modules.values():
        if f"{module.name}.weight" not in theirs:
            continue
        for key, name in ((module.original, "weight"), (module.original_bias, "bias")):
            if key is None:
                continue
            tensor = theirs[f"{module.name}.{name}"]
            if module.swapped:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            if module.transposed and name == "weight":
                tensor = tensor.mT
            rows.setdefault(key, []).append((module.start or 0, tensor))
    return {key: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) for key, parts in rows.items()}


def kohya_name(family: Family, name: str) -> str:
    """What kohya's tools call a module."""
    return family.spell(name, "kohya")
