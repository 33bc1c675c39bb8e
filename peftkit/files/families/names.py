"""Every name of a module: the spellings of adapter files and of checkpoints, to and from diffusers' own.

An adapter file names a module by a prefix and a path, dotted or with underscores for the dots, and the path is that of
the diffusers class or of the original network, whose Linear layers may hold several of ours. The underscored spelling
cannot be parsed (`a.b_c` and `a_b.c` are one), so every spelling is looked up in the list of the family's modules.

    FAMILIES          the families
    Family.find       a foreign name -> the modules whose rows it covers
    Family.spell      a module -> its name in a style
    guess             the names in an adapter file -> the families it may be of
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

from peftkit.errors import OptionError, did_you_mean, require_choice
from peftkit.files.families.denoisers import TRANSFORMER, UNET, Component, flux, sd3, unet
from peftkit.files.families.denoisers import ModuleSpec as ModuleSpec
from peftkit.files.families.encoders import CLIP_G, CLIP_H, CLIP_L, T5, clip, open_clip

#: XLabs' trainer for Flux named attention processors: ending of the original path -> ending there, modules covered
_XLABS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        ".img_attn.qkv": (".qkv_lora1", 3),
        ".img_attn.proj": (".proj_lora1", 1),
        ".txt_attn.qkv": (".qkv_lora2", 3),
        ".txt_attn.proj": (".proj_lora2", 1),
        ".linear1": (".qkv", 3),
        ".linear2": (".proj", 1),
    }
)


class _Match(NamedTuple):
    modules: tuple[ModuleSpec, ...]
    ldm: bool  # named by its path in the original network, so its rows are in the original's order


def _flat(name: str) -> str:
    """The underscored form, without what old diffusers files put into the names of attention layers."""
    return name.removesuffix("_lora").replace(".", "_").replace("_processor_", "_")


def _aliases(path: str) -> Iterator[str]:
    """What diffusers and transformers called a module in other versions."""
    yield path
    if path.endswith(".to_out.0"):
        yield path.removesuffix(".0")
    block, _, part = path.rpartition(".self_attn.")
    if block and part.endswith("_proj"):
        yield f"{block}.self_attn.to_{part.removesuffix('_proj')}"


def _matches(component: Component) -> Mapping[str, _Match]:
    """Underscored path -> what it names in this component."""
    found: dict[str, _Match] = {}
    for module in component.modules.values():
        for path in _aliases(module.path):
            for name in (path, path.removeprefix("text_model.")):  # transformers 5.6 left out that level
                found.setdefault(_flat(name), _Match((module,), ldm=False))
    for path, group in groupby(component.modules.values(), component.ldm):
        modules = tuple(group)
        found.setdefault(_flat(path), _Match(modules, ldm=True))
        for ending, (name, count) in _XLABS.items():
            if path.endswith(ending):
                found.setdefault(_flat(path.replace(ending, name)), _Match(modules[:count], ldm=True))
    return MappingProxyType(found)


@dataclass(frozen=True, eq=False)
class Family:
    """Models with the same modules, and how files of theirs are labelled."""

    name: str
    title: str
    parts: tuple[Component, ...]  # the denoiser first
    base_model_version: str  # metadata "ss_base_model_version", as sd-scripts writes it
    architecture: str  # metadata "modelspec.architecture", without "/lora"
    implementation: str  # metadata "modelspec.implementation", of a LoRA
    resolution: str  # metadata "modelspec.resolution"

    @property
    def components(self) -> tuple[str, ...]:
        """The names of its networks, the denoiser first."""
        return tuple(part.name for part in self.parts)

    @cached_property
    def modules(self) -> Mapping[str, ModuleSpec]:
        """Canonical name -> module, of all components."""
        return MappingProxyType({m.name: m for part in self.parts for m in part.modules.values()})

    def find(self, foreign: str) -> tuple[ModuleSpec, ...]:
        """Return the modules whose rows a foreign name covers, in the order of its rows; () if there are none.

        foreign: what an adapter file has before the name of the tensor. A path without a component is found if only
        one component can have it: both text encoders of SDXL have a "text_model.encoder.layers.0.mlp.fc1".
        """
        match = self._match(foreign)
        return match.modules if match else ()

    def swaps(self, foreign: str) -> bool:
        """Whether the rows of a foreign name are in the original's order, and that is not its module's (`swapped`)."""
        match = self._match(foreign)
        return match is not None and match.ldm and any(module.swapped for module in match.modules)

    def spell(self, name: str, style: str) -> str:
        """Return the foreign name of a module, which `find` reads back.

        style: "kohya", "diffusers", "ldm", "transformer", "lycoris" or "peft". Modules that the original network has
        fused have one name in "ldm", and in "kohya" where sd-scripts trains the original.
        """
        require_choice("style", style, STYLES)
        if name not in self.modules:
            raise OptionError(f"{self.title} has no module {name!r}.{did_you_mean(name, self.modules)}")
        module = self.modules[name]
        spelled = STYLES[style](self, self._part(module), module)
        if spelled is None:
            raise OptionError(f"the style {style!r} has no name for {name!r} of {self.title}: choose another style")
        return spelled

    def spelled(self, name: str, style: str) -> str:
        """Return the foreign name as `spell` does, or "" where the style has no name for the module."""
        try:
            return self.spell(name, style)
        except OptionError:
            return ""

    def own(self, foreign: str) -> bool:
        """Whether `spell` produces this exact name in some style."""
        return foreign in self._spellings

    @cached_property
    def alone(self) -> tuple[Component, ...]:
        """The components that share no path with another: there, a path without a component is clear."""
        shared = Counter(path for part in self.parts for path in part.modules)
        return tuple(part for part in self.parts if max(shared[path] for path in part.modules) == 1)

    def _part(self, module: ModuleSpec) -> Component:
        return next(part for part in self.parts if module.name.startswith(f"{part.name}."))

    def _match(self, foreign: str) -> _Match | None:
        flat = _flat(foreign).removeprefix("base_model_model_").removeprefix("lycoris_")
        found = (table.get(flat[len(prefix) :]) for prefix, table in self._tables if flat.startswith(prefix))
        return next(filter(None, found), None)

    @cached_property
    def _tables(self) -> tuple[tuple[str, Mapping[str, _Match]], ...]:
        """Underscored prefix -> the paths that may follow it."""
        tables: list[tuple[str, Mapping[str, _Match]]] = []
        for part in self.parts:
            matches = _matches(part)
            prefixes = {part.name, part.original, part.comfy, *part.webui}
            tables += [(_flat(f"{prefix.removesuffix('.')}."), matches) for prefix in sorted(prefixes)]
            tables += [("", matches)] if part in self.alone else []
        return tuple(tables)

    @cached_property
    def _spellings(self) -> frozenset[str]:
        names = (
            style(self, part, module)
            for part in self.parts
            for module in part.modules.values()
            for style in STYLES.values()
        )
        return frozenset(filter(None, names))


# ------------------------------------------------------------------------------------------------------------- spelling


def _kohya(family: Family, part: Component, module: ModuleSpec) -> str:
    del family
    return f"{part.webui[0]}_{_flat(part.ldm(module) if part.webui_ldm else module.path)}"


def _diffusers(family: Family, part: Component, module: ModuleSpec) -> str:
    del family, part
    return module.name


def _ldm(family: Family, part: Component, module: ModuleSpec) -> str:
    del family
    return f"{part.comfy}.{part.ldm(module)}"


def _transformer(family: Family, part: Component, module: ModuleSpec) -> str | None:
    if part.denoiser:
        return f"lora_transformer_{_flat(module.path)}" if part.name == "transformer" else None
    return _kohya(family, part, module) if "transformer" in family.components else None


def _lycoris(family: Family, part: Component, module: ModuleSpec) -> str | None:
    return f"lycoris_{_flat(module.path)}" if part in family.alone else None


def _peft(family: Family, part: Component, module: ModuleSpec) -> str | None:
    return f"base_model.model.{module.path}" if part in family.alone else None


#: Style -> how it spells a module, None if it cannot
STYLES: Mapping[str, Callable[[Family, Component, ModuleSpec], str | None]] = MappingProxyType(
    {
        "kohya": _kohya,  # lora_unet_…, lora_te_…: sd-scripts and every web UI
        "diffusers": _diffusers,  # unet.down_blocks.0…: diffusers, ai-toolkit
        "ldm": _ldm,  # diffusion_model.input_blocks.1…: ComfyUI
        "transformer": _transformer,  # lora_transformer_…: OneTrainer, SD 3 and Flux
        "lycoris": _lycoris,  # lycoris_…: the wrapper of LyCORIS, SimpleTuner
        "peft": _peft,  # base_model.model.…: a PEFT adapter of one component
    }
)


def guess(foreign: Mapping[str, tuple[int, int] | None]) -> tuple[Family, ...]:
    """Return the families that have all these modules in these shapes, first the ones that spell names so.

    foreign: name -> (rows, columns) of its ΔW, the columns being its fan-in; None if not known.
    """

    def fits(family: Family, name: str, shape: tuple[int, int] | None) -> bool:
        modules = family.find(name)
        if shape is None or not modules:
            return bool(modules)
        rows, columns = sum(m.shape[0] for m in modules), {math.prod(m.shape[1:]) for m in modules}
        return rows == shape[0] and columns == {shape[1]}

    fitting = [f for f in FAMILIES.values() if foreign and all(fits(f, *item) for item in foreign.items())]
    return tuple(sorted(fitting, key=lambda family: -sum(map(family.own, foreign))))


# --------------------------------------------------------------------------------------------------------- the families

_SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.5",
    parts=(
        UNET(build=partial(unet, (320, 640, 1280, 1280), (1, 1, 1, 0), middle=1, context=768, linear=False)),
        CLIP_L(original="cond_stage_model.transformer.", webui=("lora_te", "lora_te1")),
    ),
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1",
    implementation="diffusers",
    resolution="512x512",
)
_SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.1",
    parts=(
        UNET(build=partial(unet, (320, 640, 1280, 1280), (1, 1, 1, 0), middle=1, context=1024, linear=True)),
        CLIP_H(),
    ),
    base_model_version="sd_v2_v",
    architecture="stable-diffusion-v2-768-v",
    implementation="diffusers",
    resolution="768x768",
)
_SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    parts=(
        UNET(
            build=partial(unet, (320, 640, 1280), (0, 2, 10), middle=10, context=2048, linear=True, added=2816),
            webui_ldm=True,
        ),
        CLIP_L(original="conditioner.embedders.0.transformer."),
        CLIP_G(original="conditioner.embedders.1.model.", build=partial(open_clip, 1280, 32, projected=True)),
    ),
    base_model_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base",
    implementation="https://github.com/Stability-AI/generative-models",
    resolution="1024x1024",
)
_SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 Medium",
    parts=(
        TRANSFORMER(build=partial(sd3, 24)),
        CLIP_L(build=partial(clip, 768, 12, projected=True)),
        CLIP_G(),
        T5(name="text_encoder_3", webui=("lora_te3",)),
    ),
    base_model_version="3-medium",
    architecture="stable-diffusion-3-medium",
    implementation="diffusers",
    resolution="1024x1024",
)
_SD35_MEDIUM = replace(
    _SD3,
    name="sd35-medium",
    title="Stable Diffusion 3.5 Medium",
    parts=(TRANSFORMER(build=partial(sd3, 24, normed=True, dual=13)), *_SD3.parts[1:]),
    base_model_version="3-5-medium",
    architecture="stable-diffusion-3.5-medium",
)
_SD35_LARGE = replace(
    _SD3,
    name="sd35-large",
    title="Stable Diffusion 3.5 Large",
    parts=(TRANSFORMER(build=partial(sd3, 38, normed=True)), *_SD3.parts[1:]),
    base_model_version="3-5-large",
    architecture="stable-diffusion-3.5-large",
)
_FLUX = Family(
    name="flux",
    title="Flux.1",
    parts=(TRANSFORMER(build=flux), CLIP_L(), T5(name="text_encoder_2", webui=("lora_te3", "lora_te2"))),
    base_model_version="flux1",
    architecture="flux-1-dev",
    implementation="https://github.com/black-forest-labs/flux",
    resolution="1024x1024",
)

#: Where an adapter or a checkpoint can be of several families, the first is taken
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (_SD15, _SD2, _SDXL, _SD3, _SD35_MEDIUM, _SD35_LARGE, _FLUX)}
)
