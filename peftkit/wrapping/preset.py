"""Presets of LyCORIS: which modules of a model it adapts, and with which algorithm and options each."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from peftkit.errors import FileError, did_you_mean, require_file
from peftkit.wrapping.select import LYCORIS_PRESETS, class_names

_PARTS = {"model": "", "unet": "unet_", "text_encoder": "text_encoder_"}
_LISTS = (*(f"{part}target_{what}" for part in _PARTS.values() for what in ("module", "name")), "exclude_name")
_MAPS = ("module_algo_map", "name_algo_map")
_FLAGS = ("enable_conv", "use_fnmatch")
_KEYS = (*_FLAGS, *_LISTS, *_MAPS, "lora_prefix")

#: what LyCORIS' network of a single model adapts where a preset does not say; its norms are for an option of their own
_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d")
#: a module that LyCORIS adapts only with the option train_llm_adapter, which text encoders of Anima have
_LLM_ADAPTER = "LLMAdapterTransformerBlock"


@dataclass(frozen=True)
class Override:
    """What a preset says of one module.

    Attributes:
        where: the table of the preset, for messages; "" where none is of this module.
        algorithm: LyCORIS' name; None for the network's own.
        options: LyCORIS' options.
    """

    where: str = ""
    algorithm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A preset of LyCORIS.

    Attributes:
        source: its name or its file, for messages.
        keys: what it says, by LyCORIS' keys.
    """

    source: str
    keys: Mapping[str, Any]

    @property
    def large_kernels(self) -> bool:
        """Whether convolutions with larger kernels than 1 are adapted, also without a rank of their own."""
        return self.keys.get("enable_conv", True)

    def default_part(self) -> str:
        """Return which of its lists are meant for a model that is given alone."""
        return "model" if any(f"target_{what}" in self.keys for what in ("module", "name")) else "unet"

    def chosen(self, root: nn.Module, part: str, *, llm_adapter: bool = False) -> Iterator[tuple[str, Override]]:
        """Yield the name of every module that is looked at, and what is said of it; of several times the first counts.

        Args:
            root: a model.
            part: whose lists to take: "unet", "text_encoder", or "model" for those of a single model.
            llm_adapter: look into LLMAdapterTransformerBlock too.

        Raises:
            FileError: the preset has no lists for this part, or a pattern that is no regular expression.
        """
        classes, names = self._targets(part)
        classes = [name for name in classes if llm_adapter or name != _LLM_ADAPTER]
        for name, module in root.named_modules():
            own = class_names(module)[:1]
            if self._excluded(name):
                continue
            if own and own[0] in classes and not self._matches(names, name):
                yield from self._inside(name, module, self._of_class(own))
            elif name in names or self._matches(names, name):
                yield name, self._of_name(name) or self._of_class(own) or Override()

    def _inside(self, path: str, root: nn.Module, said: Override | None) -> Iterator[tuple[str, Override]]:
        """The modules of one that was chosen by its class; a class with a table of its own begins anew."""
        said = said or Override()
        for name, module in root.named_modules():
            full = ".".join(part for part in (path, name) if part)
            if self._excluded(full):
                continue
            own = self._of_class(class_names(module)[:1])
            if own is None or module is root:
                yield full, said
            else:
                inherited = own if own.algorithm else Override(own.where, said.algorithm, own.options)
                yield from self._inside(full, module, inherited)

    def _targets(self, part: str) -> tuple[Sequence[str], Sequence[str]]:
        """The classes and the names of a part, with LyCORIS' own where the preset does not say."""
        prefix = _PARTS[part]
        given = [self.keys.get(f"{prefix}target_{what}") for what in ("module", "name")]
        if part == "model":
            classes, names = (_LAYERS if given[0] is None else given[0]), given[1] or []
            return [*classes, *self.keys.get("module_algo_map", ())], [*names, *self.keys.get("name_algo_map", ())]
        if self.default_part() == "model" and not any(key in self.keys for key in _LISTS[2:6]):
            raise FileError(
                f"{self.source}: its target_module and target_name are of a single model, and this is the {part} of "
                f"several: say {prefix}target_module and {prefix}target_name, or pass the model alone with part='model'"
            )
        full = _builtin("full").keys
        classes, names = (
            full[f"{prefix}target_{what}"] if own is None else own
            for what, own in zip(("module", "name"), given, strict=True)
        )
        return classes, names

    def _excluded(self, name: str) -> bool:
        patterns = self.keys.get("exclude_name", ())
        return bool(name) and (name in patterns or self._matches(patterns, name))

    def _matches(self, patterns: Sequence[str], name: str) -> bool:
        return any(self._match(pattern, name) for pattern in patterns)

    def _match(self, pattern: str, name: str) -> bool:
        """As LyCORIS does: a glob of the whole name, or a regular expression of its beginning."""
        if self.keys.get("use_fnmatch", False):
            return fnmatch.fnmatchcase(name, pattern)
        return re.match(pattern, name) is not None

    def _of_class(self, names: Sequence[str]) -> Override | None:
        table = self.keys.get("module_algo_map", {})
        found = next((name for name in names if name in table), None)
        return None if found is None else _override("module_algo_map", found, table[found])

    def _of_name(self, name: str) -> Override | None:
        table = self.keys.get("name_algo_map", {})
        found = name if name in table else next((key for key in table if self._match(key, name)), None)
        return None if found is None else _override("name_algo_map", found, table[found])


def _override(kind: str, key: str, table: Mapping[str, Any]) -> Override:
    options = {name: value for name, value in table.items() if name != "algo"}
    return Override(f"{kind}.{key}", table.get("algo"), options)


def builtin_presets() -> tuple[str, ...]:
    """Return the names of the presets that LyCORIS has itself.

    Example:
        >>> from peftkit.wrapping.preset import builtin_presets
        >>> "unet-transformer-only" in builtin_presets()
        True
    """
    return tuple(sorted(path.stem for path in LYCORIS_PRESETS.glob("*.toml")))


def read_preset(source: str | os.PathLike[str]) -> Preset:
    """Return the preset of a name of LyCORIS, or of a file in the form of its preset files.

    Args:
        source: a name, as "attn-mlp", or the path of a TOML file.

    Raises:
        FileError: there is neither, or the file is no TOML, or has a key or a value that no preset has.
    """
    if str(source) in builtin_presets():
        return _builtin(str(source))
    path = Path(source)
    names = ", ".join(builtin_presets())
    hint = did_you_mean(str(source), builtin_presets(), count=1)
    require_file(path.is_file(), source, f"a preset's name ({names}) or the path of a preset file was expected.{hint}")
    return _parsed(path, str(source))


def _builtin(name: str) -> Preset:
    return _parsed(LYCORIS_PRESETS / f"{name}.toml", f"preset {name!r}")


def _parsed(path: Path, source: str) -> Preset:
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        keys = toml.loads(path.read_text(encoding="utf-8"))
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{source} is not a TOML file: {error}") from None
    for key in keys:
        known = f"the keys of a preset are {', '.join(_KEYS)}"
        require_file(key in _KEYS, source, f"unknown key {key!r}; {known}.{did_you_mean(key, _KEYS, count=1)}")
    for key, value in keys.items():
        _require_value(source, key, value, bool(keys.get("use_fnmatch")))
    return Preset(source, MappingProxyType(keys))


def _require_value(source: str, key: str, value: Any, globs: bool) -> None:
    """Raise FileError unless the value is one that the key can have."""
    expected, fits = _EXPECTED[key]
    require_file(fits(value), source, f"{key} = {value!r:.100}, and {expected} was expected")
    patterns = value if key.endswith("_name") else value if key == "name_algo_map" else ()
    for pattern in () if globs else patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise FileError(f"{source}: {pattern!r} in {key} is not a regular expression: {error}") from None


def _is_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_map(value: Any) -> bool:
    tables = isinstance(value, dict) and all(isinstance(table, dict) for table in value.values())
    return tables and all(isinstance(table.get("algo", ""), str) for table in value.values())


_EXPECTED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_FLAGS, ("true or false", lambda value: isinstance(value, bool))),
    **dict.fromkeys(_LISTS, ("a list of names", _is_text)),
    **dict.fromkeys(_MAPS, ("a table for each class or name, with algo as text,", _is_map)),
    # files are named when they are written, for a program
    "lora_prefix": ("'lycoris', the prefix of `pk.export(…, target='lycoris')`,", lambda value: value == "lycoris"),
}
