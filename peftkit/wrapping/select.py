"""Which weights a pattern selects: names, globs, classes and presets; and which of them are shared."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftkit.errors import TargetError, UnsupportedLayerError, did_you_mean
from peftkit.wrapping.sites import Site, dotted, sites, why_not

_ATTENTION = r".*(Attention|Attn)\d*"
_MLP = r".*(MLP|Mlp|FeedForward|FFN|LayerFF|Intermediate|Output)|.*Transformer(2DModel|Block)|.*(Encoder|Decoder)Layer"

#: preset -> classes inside which every layer is adapted, after the three presets of the LyCORIS paper, section 5
PRESETS: Mapping[str, str] = {
    "full": r".*",
    "attn-mlp": f"{_ATTENTION}|{_MLP}",
    "attn-only": _ATTENTION,
}


class Selector:
    """Patterns to sites of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.sites = sites(model)
        self.skipped: dict[str, str] = {}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        first = {id(module): name for name, module in model.named_modules()}
        #: every name of a module -> the one its sites go by
        self.canonical = {name: first[id(module)] for name, module in self.modules.items()}
        self.within: dict[str, list[str]] = {}
        self.of_module: dict[str, list[str]] = {}
        for site in self.sites.values():
            self.of_module.setdefault(site.module_name, []).append(site.name)
            parts = site.name.split(".")
            for end in range(len(parts) + 1):
                self.within.setdefault(".".join(parts[:end]), []).append(site.name)

    def find(self, pattern: str) -> list[str]:
        """The sites a pattern selects, in model order; raises if there are none."""
        if pattern in PRESETS and pattern not in self.modules:
            found, refused = self._inside_classes(re.compile(PRESETS[pattern]))
        elif pattern.startswith("re:"):
            found, refused = self._by_name(_regex(pattern[3:]))
        elif any(c in pattern for c in "*?["):
            found, refused = self._by_name(re.compile(fnmatch.translate(pattern)))
        else:
            found, refused = self._exactly(pattern)
        if found:
            self.skipped.update(refused)
            return [site for site in self.sites if site in found]
        if refused:
            name, reason = next(iter(refused.items()))
            more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            raise UnsupportedLayerError(
                f"target {pattern!r} matches only {name}{more}, which cannot be adapted: {reason}"
            )
        raise TargetError(f"target {pattern!r} matches no layer of the model.{self._hint(pattern)}")

    def _by_name(self, regex: re.Pattern[str]) -> tuple[set[str], dict[str, str]]:
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

    def _exactly(self, pattern: str) -> tuple[set[str], dict[str, str]]:
        if pattern in self.sites:
            return {pattern}, {}
        named = [pattern] if pattern in self.modules else []
        # typed: every class a module is an instance of counts, so "Linear" finds subclasses of nn.Linear too
        typed = [n for n, m in self.modules.items() if any(c.__name__ == pattern for c in type(m).__mro__)]
        found: set[str] = set()
        refused: dict[str, str] = {}
        for name in named or typed:
            inside = self.within.get(self.canonical[name], [])
            found.update(inside)
            if not inside:
                refused[name] = why_not(self.modules[name]) or "there is no Linear or convolution inside it"
        return found, refused

    def _inside_classes(self, classes: re.Pattern[str]) -> tuple[set[str], dict[str, str]]:
        holders = [n for n, m in self.modules.items() if any(classes.fullmatch(c.__name__) for c in _own_classes(m))]
        found = {site for name in holders for site in self.within.get(self.canonical[name], [])}
        refused = {}
        for name, module in self.modules.items():
            matrices = any(p is not None and p.dim() > 1 for p in module._parameters.values())
            if matrices and not self.within.get(name) and any(_inside(name, holder) for holder in holders):
                reason = why_not(module)
                if reason is not None:
                    refused[name] = reason
        return found, refused

    def _hint(self, pattern: str) -> str:
        if not self.sites:
            return " It has no Linear or convolution at all."
        tails = {name: name.rsplit(".", 1)[-1] for name in self.sites}
        if any(tail == pattern for tail in tails.values()):
            return f" Layers of that last name are matched by '*.{pattern}'."
        classes = {c.__name__ for m in self.modules.values() for c in _own_classes(m)}
        hint = did_you_mean(pattern, [*self.modules, *self.sites, *classes, *PRESETS, *tails.values()])
        return hint or f" Its layers are named like {', '.join(map(repr, list(self.sites)[:3]))}."


def _inside(name: str, holder: str) -> bool:
    """Whether a module of that name is the holder or below it."""
    return not holder or name == holder or name.startswith(f"{holder}.")


def _own_classes(module: nn.Module) -> list[type]:
    """The module's classes below nn.Module."""
    mro = type(module).__mro__
    return list(mro[: mro.index(nn.Module)])


def _regex(source: str) -> re.Pattern[str]:
    try:
        return re.compile(source)
    except re.error as error:
        raise TargetError(f"target 're:{source}' is not a regular expression: {error}") from None


def patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(p, str) and p for p in given):
        raise TargetError(f"targets are strings, {value!r} was given")
    return given


def tied_with(model: nn.Module, targeted: Sequence[Site]) -> dict[str, str]:
    """Targeted site -> the names of other parameters with the same memory."""
    owners: dict[Any, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(dotted(module_name, parameter_name))
    shared: dict[str, str] = {}
    for site in targeted:
        own = dotted(site.module_name, site.slot.parameter)
        others = [other for other in owners[_memory(site.parameter)] if other != own]
        if others:
            shared[site.name] = ", ".join(others)
    return shared


def _memory(parameter: torch.Tensor) -> Any:
    if parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    try:
        return parameter.untyped_storage().data_ptr(), parameter.storage_offset()
    except (NotImplementedError, RuntimeError):  # a wrapper subclass has no storage of its own
        return id(parameter)


def listed(items: Iterable[str], most: int = 3) -> str:
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more
