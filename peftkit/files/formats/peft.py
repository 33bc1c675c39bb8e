"""PEFT's folders: the tensors of adapter_model.safetensors, beside the configuration that says what they are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats import embeddings, kohya, peft_methods, peft_multiplicative, peft_projections, peft_shared
from peftkit.files.formats.kohya import Modules
from peftkit.files.formats.patch import Patch
from peftkit.files.formats.peft_config import CONFIG as CONFIG
from peftkit.files.formats.peft_config import flag
from peftkit.files.formats.structures import Scale

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

#: layers that PEFT saves whole, unasked, where the vocabulary was resized
_SAVED_EMBEDDINGS = ("embed_tokens", "lm_head")
_KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
#: the types that train biases of adapted layers (bias="lora_only"), go on embeddings, and are read by servers
BIASED = ON_EMBEDDINGS = SERVED = ("LORA",)
#: the types that go on layers whose weight is kept as (in, out), GPT-2's Conv1D, by fan_in_fan_out
FLIPPED = ("LORA", "IA3", "ADALORA", "VERA", "RANDLORA", "FOURIERFT", "VBLORA", "TINYLORA")
#: the types that PEFT does not write as kohya does -> their readers
_READERS = MappingProxyType(
    {**peft_multiplicative.READERS, **peft_methods.READERS, **peft_projections.READERS, **peft_shared.READERS},
)
_ENDS = {**embeddings.ENDS, **peft_methods.ENDS, **peft_projections.ENDS, **peft_shared.ENDS}
#: the tensors that PEFT writes, by role
_ROLES = frozenset(
    {"up", "down", "magnitude", "oft_R", "ia3_l", *_ENDS.values()}
    | {role for role in kohya.SUFFIXES.values() if role.startswith(("hada_", "lokr_"))}
)


def modules(keys: list[str]) -> tuple[Modules, list[str]]:
    """Sort keys as {path in the model: {role: key}}, and return the keys that PEFT does not write beside it."""
    ends = {key: next((end for end in _ENDS if key.endswith(end)), "") for key in keys}
    found, unknown = kohya.split([key for key, end in ends.items() if not end])
    for key, end in ends.items():
        if end:
            found.setdefault(key.removesuffix(end), {})[_ENDS[end]] = key
    own: Modules = {}
    for module, roles in found.items():
        path = module.removeprefix(PREFIX)
        require_file(path not in own, path, f"it is there twice, with and without {PREFIX!r}")
        unknown += [key for role, key in roles.items() if role not in _ROLES]
        own[path] = {role: key for role, key in roles.items() if role in _ROLES}
    return {path: roles for path, roles in own.items() if roles}, unknown


def beside(keys: Iterable[str], config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Sort the keys of what trained beside the adapters.

    Args:
        keys: those that no adapter has.
        config: PEFT's configuration, which says which modules and biases were trained.

    Returns:
        {parameter of the model: key} of values; {module: key} of the biases of lora_B; and the keys that are neither.
    """
    given = config.get("modules_to_save") or []
    listed = isinstance(given, list) and all(isinstance(module, str) for module in given)
    require_file(listed, CONFIG, f"modules_to_save is {given!r:.40}, a list of names was expected")
    whole = [*given, *_SAVED_EMBEDDINGS]
    biases = config.get("bias") in ("all", "lora_only")
    extras: dict[str, str] = {}
    shifts: dict[str, str] = {}
    unknown: list[str] = []
    for key in keys:
        path = key.removeprefix(PREFIX)
        name = re.sub(r"\.modules_to_save(\.[\w-]+)?(?=\.)", "", path)
        parents = list(itertools.accumulate(name.split(".")[:-1], lambda a, b: f"{a}.{b}"))
        saved = name != path or any(f".{parent}".endswith(f".{module}") for parent in parents for module in whole)
        if path.endswith((".lora_B.bias", ".lora_B.default.bias")) and config.get("lora_bias"):
            shifts[path.partition(".lora_B.")[0]] = key
        elif path.endswith(".base_layer.bias") and biases:
            extras[path.replace(".base_layer.bias", ".bias")] = key
        elif saved or (path.endswith(".bias") and "lora_" not in path and biases):
            require_file(name not in extras, name, f"it is there twice, as {key} and {extras.get(name)}")
            extras[name] = key
        else:
            unknown.append(key)
    return extras, shifts, unknown


def patch(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any], scale: Scale) -> Patch:
    """Read one module's adapter.

    Args:
        module: its path, for errors.
        t: its tensors by role.
        config: PEFT's configuration.
        scale: `scale_of` the configuration.

    Raises:
        FileError: if the tensors and the configuration do not make one adapter.
    """
    kind, flipped = config["peft_type"], flag(config, "fan_in_fan_out")
    require_file(not flipped or kind in FLIPPED, module, f"fan_in_fan_out with {kind} is not read: PEFT has none")
    if kind in _READERS:
        return replace(_READERS[kind](module, t, config), transposed=flipped)
    embedding = bool(set(embeddings.ENDS.values()) & set(t))
    if embedding:
        t = embeddings.as_linear(module, t)
    has, said = "magnitude" in t or "dora_scale" in t, f"use_dora={config.get('use_dora')!r} in {CONFIG}"
    require_file(has == flag(config, "use_dora"), module, f"it has {'' if has else 'no '}magnitudes, and {said}")
    found = kohya.patch(module, t, scale)
    if found is None or _KINDS.get(kind) not in (found.kind, found.options.get("inner")):
        raise FileError(f"{module}: {', '.join(sorted(t))} is not what a {kind} adapter has")
    if {"outer", "block"} <= set(found.tensors):
        found = _scaled_full_lokr(module, found, scale)
    return replace(found, transposed=flipped and not embedding, embedding=embedding)


def _scaled_full_lokr(module: str, found: Patch, scale: Scale) -> Patch:
    """PEFT divides alpha by the configured rank even where no factor has one."""
    options, words = scale(module, None)
    options |= {"full_scale": "alpha/rank"}
    return Patch("lokr", found.options | options, found.shape, found.tensors, found.kernel_known, scale=words)
