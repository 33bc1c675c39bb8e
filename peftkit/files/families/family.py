"""A model family: its networks, and every name of a module in adapter files, to and from diffusers' own.

An adapter file names a module by a prefix and a path, dotted or with underscores for the dots, and the path is that of
the diffusers class or of the original network, whose Linear layers may hold several of ours. The underscored spelling
cannot be parsed (`a.b_c` and `a_b.c` are one), so every spelling is looked up in the list of the family's modules.

    Family.find       a foreign name -> the modules whose rows it covers
    Family.spell      a module -> its name in a style
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

from peftkit.errors import OptionError, did_you_mean, require_choice
from peftkit.files.families.module import NUMBER, Component, ModuleSpec
from peftkit.files.families.prefixes import usual

#: What else names a part of a layer of Flux: ending of the original path -> endings there, and modules covered. XLabs'
#: trainer named attention processors; ComfyUI knows the attention's rows of a single block's first layer by themselves
_PARTLY: Mapping[str, tuple[tuple[str, int], ...]] = MappingProxyType(
    {
        ".img_attn.qkv": ((".qkv_lora1", 3),),
        ".img_attn.proj": ((".proj_lora1", 1),),
        ".txt_attn.qkv": ((".qkv_lora2", 3),),
        ".txt_attn.proj": ((".proj_lora2", 1),),
        ".linear1": ((".qkv", 3), (".linear1_qkv", 3)),
        ".linear2": ((".proj", 1),),
    }
)
_FIRST_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")
#: what trainers put before every name, whatever the model
_WRAPPERS = ("base_model_model_", "lycoris_")


class _Match(NamedTuple):
    modules: tuple[ModuleSpec, ...]
    ldm: bool  # named by its path in the original network, so its rows are in the original's order
    depth: int = 0  # how many blocks have them, 0 where the names have no number
    number: int = 0  # of the block


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


@cache
def _matches(component: Component) -> Mapping[str, _Match]:
    """Underscored path -> what it names in this component."""
    found: dict[str, _Match] = {}
    for module in component.specs:
        match = _Match((module,), ldm=False, depth=component.depth(module))
        for path in _aliases(module.path):
            for name in {path, path.removeprefix("text_model.")}:  # transformers 5.6 left out that level
                found.setdefault(_flat(name), match)
    for path, group in groupby(component.specs, component.ldm):
        modules = tuple(group)
        depth = component.depth(modules[0])
        for spelled in {path, component.comfy_path(path)}:
            found.setdefault(_flat(spelled), _Match(modules, ldm=True, depth=depth))
        for ending in filter(path.endswith, _PARTLY if path.endswith(tuple(_PARTLY)) else ()):
            for name, count in _PARTLY[ending]:
                found.setdefault(_flat(path.replace(ending, name)), _Match(modules[:count], ldm=True, depth=depth))
    return MappingProxyType(found)


def _lookup(table: Mapping[str, _Match], path: str) -> _Match | None:
    """What an underscored path names, of the block whose number it has where all blocks are alike."""
    exact = table.get(path)
    if exact is not None and not exact.depth:
        return exact
    number = _FIRST_NUMBER.search(path)
    match = None if number is None else table.get(path[: number.start()] + NUMBER + path[number.end() :])
    if number is None or match is None or int(number[0]) >= match.depth:
        return None
    modules = tuple(module.numbered(number[0]) for module in match.modules)
    return match._replace(modules=modules, number=int(number[0]))


@dataclass(frozen=True, eq=False)
class Family:
    """Models with the same modules, and how files of theirs are labelled.

    Attributes:
        name: as `export` takes it.
        title: for messages.
        parts: its networks, the denoiser first.
        reads: program -> the styles in which it looks for the denoiser's names, the one to write first.
        unread: program -> patterns of modules that it never looks for; "program style" -> of those that it does not
            look for under their names in that style.
        published: the month of the first model, "2024-08": where a file can be of several families, the oldest is
            taken.
        base_model_version: metadata "ss_base_model_version", as sd-scripts and musubi-tuner write it.
        architecture: metadata "modelspec.architecture", without "/lora".
        implementation: metadata "modelspec.implementation", of a LoRA.
        resolution: metadata "modelspec.resolution".
    """

    name: str
    title: str
    parts: tuple[Component, ...]
    reads: Mapping[str, tuple[str, ...]] = field(repr=False)
    published: str
    base_model_version: str
    architecture: str
    implementation: str
    resolution: str
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

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

    def whole(self, foreign: Iterable[str]) -> bool:
        """Whether foreign names are of every block of the lists of blocks that any of them is in."""
        reached: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
        for match in filter(None, map(self._match, foreign)):
            if match.depth:
                blocks = match.modules[0].name.partition(f".{match.number}.")[0]
                reached[blocks, match.depth].add(match.number)
        return all(len(numbers) == depth for (_, depth), numbers in reached.items())

    def style(self, program: str, name: str = "") -> str | None:
        """Return the style in which the denoiser's names are written for a program, None where it reads none.

        name: of the module to write; by default of one that the program finds in every style it knows.
        """
        styles = self.reads.get(program, ())
        return next((style for style in styles if not name or self.looked_for(name, program, style)), None)

    def looked_for(self, name: str, program: str, style: str = "") -> bool:
        """Whether a program reads an adapter of a module, or reads it in one style."""
        patterns = (*self.unread.get(program, ()), *(self.unread.get(f"{program} {style}", ()) if style else ()))
        return not any(fnmatchcase(name, pattern) for pattern in patterns)

    def keeps_original(self, style: str | None) -> bool:
        """Whether the names of a style are of the original network's layers, which may hold several of diffusers'."""
        return style == "ldm" or (style == "kohya" and self.parts[0].webui_ldm)

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
        modules = self.find(foreign)
        return bool(modules) and any(self.spelled(modules[0].name, style) == foreign for style in STYLES)

    @cached_property
    def alone(self) -> tuple[Component, ...]:
        """The components that share no path with another, nor with other models: there, a path alone is clear."""
        shared = Counter(spec.path for part in self.parts for spec in part.specs)
        own = (part for part in self.parts if not part.general)
        return tuple(part for part in own if max(shared[spec.path] for spec in part.specs) == 1)

    def _part(self, module: ModuleSpec) -> Component:
        return next(part for part in self.parts if module.name.startswith(f"{part.name}."))

    def _match(self, foreign: str) -> _Match | None:
        flat = _flat(usual(foreign))
        for wrapper in _WRAPPERS:
            flat = flat.removeprefix(wrapper)
        parts = ((part, flat[len(prefix) :]) for prefix, part in self._prefixes if flat.startswith(prefix))
        return next(filter(None, (_lookup(_matches(part), path) for part, path in parts)), None)

    @cached_property
    def _prefixes(self) -> tuple[tuple[str, Component], ...]:
        """Underscored prefix -> the component whose paths may follow it."""
        found: list[tuple[str, Component]] = []
        for part in self.parts:
            prefixes = {part.name, part.original, part.comfy, *part.prefixes, *part.webui}
            found += [(_flat(f"{prefix.removesuffix('.')}."), part) for prefix in sorted(prefixes)]
            found += [("", part)] if part in self.alone else []
        return tuple(found)


# ------------------------------------------------------------------------------------------------------------- spelling


def _kohya(family: Family, part: Component, module: ModuleSpec) -> str:
    del family
    return f"{part.webui[0]}_{_flat(part.ldm(module) if part.webui_ldm else module.path)}"


def _diffusers(family: Family, part: Component, module: ModuleSpec) -> str:
    del family, part
    return module.name


def _ldm(family: Family, part: Component, module: ModuleSpec) -> str:
    del family
    return f"{part.comfy}.{part.comfy_path(part.ldm(module))}"


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
