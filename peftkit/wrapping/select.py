"""Which weights a pattern selects: names, globs, classes and presets; and which weights are shared."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from peftkit.errors import TargetError, UnsupportedLayerError, did_you_mean
from peftkit.geometry import is_layer
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.layer import Adapted, base_class
from peftkit.wrapping.lookup import EMBEDDINGS
from peftkit.wrapping.recurrence import RECURRENT
from peftkit.wrapping.sites import Site, sites, why_not
from peftkit.wrapping.stacks import StackGeometry
from peftkit.wrapping.vectors import is_norm, vector_sites
from peftkit.wrapping.walk import dotted, named_modules

# A block of a U-Net that is named for the attention in it, UNetMidBlock2DCrossAttn, holds resnets too
_ATTENTION = r"(?!.*Block\dD).*(Attention|Attn)\d*"
_MLP = r".*(MLP|Mlp|FeedForward|FFN|LayerFF|Intermediate|Output)"
# Transformer2DModel is a part of a U-Net; FluxTransformer2DModel and its like are whole networks
_BLOCK = r"Transformer2DModel|.*TransformerBlock|.*(Encoder|Decoder)Layer"

#: preset -> classes inside which every layer is adapted, after the three presets of the LyCORIS paper, section 5
PRESETS: Mapping[str, str] = {
    "full": r".*",
    "attn-mlp": f"{_ATTENTION}|{_MLP}|{_BLOCK}",
    "attn-only": _ATTENTION,
}

_HEAD = "it is the model's output head, which presets leave out; name it to adapt it"
_EMBEDDING = (
    "it is an embedding, and the target adapts other layers; a target that matches nothing but embeddings adapts them, "
    "as 'Embedding' or '*.embed_tokens'"
)
_EXPERTS = "they are stacks of experts, which presets leave out; name them to adapt them, as by '*experts*'"
_RECURRENT = (
    "it is a recurrent layer, and the target adapts other layers; a target that matches nothing but recurrent layers "
    "adapts them, as 'LSTM' or '*.weight_ih_l0'"
)
_ALL_LINEAR = (
    " PEFT's 'all-linear' is 'full' here, every Linear and convolution but the output head, "
    "or 'Linear', every Linear layer."
)
#: where the presets of LyCORIS are, which are lists of classes and no targets
LYCORIS_PRESETS = Path(__file__).with_name("presets")


class Selection(NamedTuple):
    """What a pattern matches: names of sites, and names of what it does not adapt with the reasons."""

    sites: list[str]
    refused: dict[str, str]


class Selector:
    """The weights of one model that can be adapted, by pattern."""

    def __init__(self, model: nn.Module) -> None:
        self.sites = sites(model)
        #: norms and biases, which only a pattern that matches no matrix selects
        self.vectors = vector_sites(model)
        self.all_sites = {**self.sites, **self.vectors}
        self.modules = dict(named_modules(model, every_name=True))
        first = {id(module): name for name, module in named_modules(model)}
        #: every name of a module -> the one its sites go by
        self.canonical = {name: first[id(module)] for name, module in self.modules.items()}
        self.within: dict[str, list[str]] = {}
        self.of_module: dict[str, list[str]] = {}
        for site in self.sites.values():
            self.of_module.setdefault(site.module_name, []).append(site.name)
            parts = site.name.split(".")
            for end in range(len(parts) + 1):
                self.within.setdefault(".".join(parts[:end]), []).append(site.name)

    def find(self, pattern: str) -> Selection:
        """Return the sites that a pattern selects, in model order, at least one: norms and biases where no matrix is.

        Raises:
            TargetError: the pattern matches no layer.
            UnsupportedLayerError: nothing that it matches can be adapted.
        """
        found, refused = self._match(pattern)
        embeddings = {site for site in found if self.sites[site].looks_up}
        if embeddings and (embeddings != found or self.is_preset(pattern)):
            found, refused = found - embeddings, refused | dict.fromkeys(sorted(embeddings), _EMBEDDING)
        recurrent = {site for site in found if isinstance(self.sites[site].module, RECURRENT)}
        if recurrent and (recurrent != found or self.is_preset(pattern)):
            left_out = sorted({self.sites[site].module_name for site in recurrent})
            found, refused = found - recurrent, refused | dict.fromkeys(left_out, _RECURRENT)
        if found:
            return Selection([site for site in self.sites if site in found], refused)
        vectors = self._vectors(pattern)
        if vectors:
            return Selection([site for site in self.vectors if site in vectors], {})
        if refused:
            raise UnsupportedLayerError(
                f"target {pattern!r} matches nothing that it adapts. {'. '.join(reasons(refused))}"
            )
        raise TargetError(f"target {pattern!r} matches no layer of the model.{self._hint(pattern)}")

    def every(self, pattern: str) -> set[str]:
        """Return all sites that a pattern matches, at least one, embeddings, norms and biases too: for `exclude`."""
        found = self._match(pattern)[0] | self._vectors(pattern)
        return found or set(self.find(pattern).sites)

    def distinct(self) -> list[nn.Module]:
        """Return the model's modules, each once."""
        return [module for name, module in self.modules.items() if self.canonical[name] == name]

    def is_preset(self, pattern: str) -> bool:
        """Return whether a pattern is a preset's name, and no module's."""
        return pattern in PRESETS and pattern not in self.modules

    def promised(
        self, matched: Selection, chosen: Collection[str]
    ) -> tuple[list[Site], dict[str, tuple[nn.Module, str]]]:
        """Return the sites of a preset, and what else it stands for: no embeddings, and no output head.

        Args:
            matched: what the preset selects.
            chosen: names of sites that get an adapter, by whatever target; they count as the preset's.
        """
        refused = {
            name: (self.modules[name], reason)
            for name, reason in matched.refused.items()
            if reason != _HEAD and not isinstance(self.modules[name], EMBEDDINGS)
        }
        named = [site for name in refused if self.adapted(name, chosen) for site in self._own(name)]
        lacking = {name: found for name, found in refused.items() if not self.adapted(name, chosen)}
        return [self.sites[site] for site in (*matched.sites, *named)], lacking

    def adapted(self, name: str, chosen: Collection[str]) -> bool:
        """Return whether all the sites of a module, of which there are some, are among these."""
        own = self._own(name)
        return bool(own) and all(site in chosen for site in own)

    def _own(self, name: str) -> list[str]:
        """The sites of one module."""
        return self.of_module.get(self.canonical[name], []) if name in self.canonical else []

    def _match(self, pattern: str) -> tuple[set[str], dict[str, str]]:
        if self.is_preset(pattern):
            return self._by_preset(re.compile(PRESETS[pattern]))
        if pattern.startswith("re:"):
            return self._by_name(regular_expression(pattern[3:]))
        if any(c in pattern for c in "*?["):
            return self._by_name(re.compile(fnmatch.translate(pattern)))
        if pattern in self.sites:
            return {pattern}, {}
        if pattern in self.modules:
            return self._inside([pattern])
        # Every class that a module is an instance of counts: "Linear" finds subclasses of nn.Linear too
        typed = [name for name, module in self.modules.items() if pattern in class_names(module)]
        return self._inside(typed) if typed else self._by_name(re.compile(rf".*\.{re.escape(pattern)}"))

    def _by_name(self, regex: re.Pattern[str]) -> tuple[set[str], dict[str, str]]:
        """The sites and the modules whose whole name matches."""
        found = {site for site in self.sites if regex.fullmatch(site)}
        refused: dict[str, str] = {}
        for name, module in self.modules.items():
            if not regex.fullmatch(name):
                continue
            inside = self.of_module.get(self.canonical[name], [])
            found.update(inside)
            reason = why_not(module)
            if not inside and reason is not None:
                refused[name] = reason
        return found, refused

    def _inside(self, names: Iterable[str]) -> tuple[set[str], dict[str, str]]:
        """All sites inside the modules of these names; a module without any is refused."""
        inside = {name: self.within.get(self.canonical[name], []) for name in names}
        refused = {
            name: why_not(self.modules[name]) or "there is no Linear or convolution inside it"
            for name, found in inside.items()
            if not found
        }
        return {site for found in inside.values() for site in found}, refused

    def _vectors(self, pattern: str) -> set[str]:
        """The norms and biases that a pattern matches; a preset matches none."""
        if self.is_preset(pattern):
            return set()
        if pattern.startswith("re:"):
            return self._vectors_by_name(regular_expression(pattern[3:]))
        if any(c in pattern for c in "*?["):
            return self._vectors_by_name(re.compile(fnmatch.translate(pattern)))
        if pattern in self.modules:
            own = {self.canonical[pattern]}
        elif pattern in self.vectors:
            return {pattern}
        else:
            own = {self.canonical[name] for name, module in self.modules.items() if pattern in class_names(module)}
        if not own:
            return self._vectors_by_name(re.compile(rf".*\.{re.escape(pattern)}"))
        # a bias beside a matrix goes by its own name, so that a layer which cannot be adapted says why
        norms = [v for v in self.vectors.values() if is_norm(v.module) or not _holds_matrices(v.module)]
        return {v.name for v in norms if any(_below(v.module_name, name) for name in own)}

    def _vectors_by_name(self, regex: re.Pattern[str]) -> set[str]:
        """The norms and biases whose whole name matches, and all that a norm whose name matches has."""
        norms = {v.module_name for v in self.vectors.values() if not v.slot_name and regex.fullmatch(v.name)}
        return {v.name for v in self.vectors.values() if v.module_name in norms or regex.fullmatch(v.name)}

    def _by_preset(self, classes: re.Pattern[str]) -> tuple[set[str], dict[str, str]]:
        """All sites inside the modules of these classes but the output head and experts, which are refused."""
        holders = [name for name, module in self.modules.items() if any(map(classes.fullmatch, class_names(module)))]
        found = {site for name in holders for site in self.within.get(self.canonical[name], [])}
        refused = {
            name: reason
            for name, module in self.modules.items()
            if _holds_matrices(module) and not self.within.get(name) and any(_below(name, h) for h in holders)
            if (reason := why_not(module)) is not None
        }
        heads = found & self._output_heads()
        experts = {site for site in found if isinstance(self.sites[site].slot.geometry, StackGeometry)}
        holding = sorted({self.sites[site].module_name for site in experts})
        refused |= dict.fromkeys(sorted(heads), _HEAD) | dict.fromkeys(holding, _EXPERTS)
        return found - heads - experts, refused

    def _output_heads(self) -> set[str]:
        """The sites of output embeddings, as the models of transformers name them by a method."""
        getters = [getattr(module, "get_output_embeddings", None) for module in self.modules.values()]
        heads = {id(getter()) for getter in getters if callable(getter)}
        return {site.name for site in self.sites.values() if id(site.module) in heads}

    def _hint(self, pattern: str) -> str:
        """What the user may have meant, of what would be selected."""
        if not self.sites:
            return " It has no Linear or convolution at all."
        if pattern == "all-linear":
            return _ALL_LINEAR
        if not self.is_preset(pattern) and (LYCORIS_PRESETS / f"{pattern}.toml").is_file():
            return f" It is a preset of LyCORIS: give rules=pk.preset_rules(model, {pattern!r}, kind, …)."
        holders = [name for name in self.modules if name and self.within.get(self.canonical[name])]
        if any(name.endswith(f".{pattern}") for name in holders):
            return f" The layers inside modules of that last name are matched by '*.{pattern}.*'."
        classes = [name for holder in holders for name in class_names(self.modules[holder])]
        presets = [preset for preset in PRESETS if preset != pattern and self._match(preset)[0]]
        ends = [name.rpartition(".")[2] for name in self.sites]
        hint = did_you_mean(pattern, dict.fromkeys([*holders, *self.sites, *classes, *presets, *ends]))
        return hint or f" Its layers are named like {', '.join(map(repr, list(self.sites)[:3]))}."


def _below(name: str, holder: str) -> bool:
    """Whether a module of that name is the holder or inside it."""
    return not holder or name == holder or name.startswith(f"{holder}.")


def _holds_matrices(module: nn.Module) -> bool:
    """Whether the module is a layer, or has a parameter of two or more dimensions."""
    own = [p for p in own_parameters(module).values() if p is not None]
    return is_layer(module) or any(not is_lazy(p) and p.dim() > 1 for p in own)


def class_names(module: nn.Module) -> list[str]:
    """The names of the module's classes below nn.Module, without what wrapping made of them."""
    mro = (base_class(module) if isinstance(module, Adapted) else type(module)).__mro__
    return [cls.__name__ for cls in mro[: mro.index(nn.Module)]]


def regular_expression(source: str) -> re.Pattern[str]:
    """Return what follows "re:" in a target, compiled; raises TargetError where it is no regular expression."""
    try:
        return re.compile(source)
    except re.error as error:
        raise TargetError(f"target 're:{source}' is not a regular expression: {error}") from None


def patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return one pattern or several as a tuple; raises TargetError unless they are strings."""
    given = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(p, str) and p for p in given):
        raise TargetError(f"targets are strings, {value!r} was given")
    return given


def tied_with(model: nn.Module, targeted: Sequence[Site]) -> dict[str, str]:
    """Return, for each targeted site that shares its memory, the names of the other parameters in it."""
    owners: dict[Any, list[str]] = {}
    for module_name, module in named_modules(model):
        for parameter_name, parameter in own_parameters(module).items():
            if parameter is not None:
                owners.setdefault(memory(parameter), []).append(dotted(module_name, parameter_name))
    shared: dict[str, str] = {}
    for site in targeted:
        own = dotted(site.module_name, site.slot.parameter)
        others = [other for other in owners[memory(site.parameter)] if other != own]
        if others:
            shared[site.name] = ", ".join(others)
    return shared


def memory(parameter: torch.Tensor) -> Any:
    """Return what two parameters have in common if one is written through the other."""
    if parameter.is_meta or is_lazy(parameter) or parameter.numel() == 0:
        return id(parameter)
    try:
        return parameter.untyped_storage().data_ptr(), parameter.storage_offset()
    except (NotImplementedError, RuntimeError):  # a wrapper subclass has no storage of its own
        return id(parameter)


def reasons(refused: Mapping[str, str]) -> list[str]:
    """Return one line for each reason: the first names that are refused for it, and the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(name or "the model")
    return [f"{listed(own)}: {reason}" for reason, own in names.items()]


def listed(items: Iterable[str], most: int = 3) -> str:
    """Return the first items in one line, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more
