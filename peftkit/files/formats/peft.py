"""PEFT's folders: adapter_config.json, which holds the scale, beside adapter_model.safetensors."""

from __future__ import annotations

import difflib
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import FileError, did_you_mean, require_file
from peftkit.files.formats import embeddings, kohya, peft_methods, strict_json
from peftkit.files.formats.kohya import Modules
from peftkit.files.formats.patch import Patch
from peftkit.files.formats.structures import Scale
from peftkit.geometry import Shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

#: of OFT on a convolution with a larger kernel, where PEFT's forward and its merge are not the same
_MERGED = (
    "PEFT rotates patches of the input that overlap, which no change of the weight does; the file is read as "
    "merge_and_unload() of PEFT merges it, which is not the forward that PEFT trained"
)
#: layers that PEFT saves whole, unasked, where the vocabulary was resized
_SAVED_EMBEDDINGS = ("embed_tokens", "lm_head")
#: the entries of a configuration that are about the model
_OF_MODEL = ("base_model_name_or_path", "task_type", "auto_mapping", "revision")
_LARGE = 2**62
#: no real name or pattern is longer, and matching takes long
_LONGEST = 1000

#: inits that move part of the base into the adapter: what the file adds to is then not the base
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "IA3", "TRAINABLE_TOKENS", *peft_methods.READERS)
_KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
#: the types whose modules are scaled by α/r -> the option that has α
_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
#: the types that train biases of adapted layers (bias="lora_only"), go on embeddings, and are read by servers
BIASED = ON_EMBEDDINGS = SERVED = ("LORA",)
#: the types that go on layers whose weight is kept as (in, out), GPT-2's Conv1D, by fan_in_fan_out
FLIPPED = ("LORA", "IA3")
_ENDS = {**embeddings.ENDS, **peft_methods.ENDS}
#: the tensors that PEFT writes, by role
_ROLES = frozenset(
    {"up", "down", "magnitude", "oft_R", "ia3_l", *_ENDS.values()}
    | {role for role in kohya.SUFFIXES.values() if role.startswith(("hada_", "lokr_"))}
)
#: what ΔW's scale depends on, which a misspelt key would change in silence; what PEFT calls almost so; how near that is
_SCALES = ("lora_alpha", "alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
_ALIKE = ("use_qalora", "use_bdlora", "use_lora")
_NEAR = 0.85


def read_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json and check it as far as this library depends on it. Raises FileError."""
    config = strict_json.read_json(path)
    holds = type(config).__name__
    require_file(isinstance(config, dict), path, f"it holds a {holds}, and a configuration of PEFT is a JSON object")
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    require_file(kind in _TYPES, path, f"peft_type is {kind!r}; this library reads {', '.join(_TYPES)}")
    require_file(
        not str(init).startswith(_BASE_CHANGING),
        path,
        f"init_lora_weights={init!r} moved part of the base into the adapter, so that the file does not say what it "
        "adds to the base; convert it with PEFT's path_initial_model_for_weight_conversion first",
    )
    for option in ("use_qalora", "alora_invocation_tokens", "use_bdlora", "layer_replication"):
        value = config.get(option)
        require_file(not value, path, f"{option}={value!r} is more than a change of weights, and is not read")
    for key in sorted(config.keys() - {*_SCALES, *_ALIKE}):
        near = difflib.get_close_matches(key, _SCALES, n=1, cutoff=_NEAR)
        require_file(not near, path, f"{key!r} is no option of PEFT, and would be ignored.{did_you_mean(key, near)}")
    return config


def of_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of the model that the adapters are for."""
    return {name: config[name] for name in _OF_MODEL if config.get(name) is not None}


def scale_of(config: Mapping[str, Any]) -> Scale:
    """Return the scale γ by a configuration: lora_alpha (or alpha) / r, per module where a pattern matches it."""
    default_alpha = config.get("lora_alpha", config.get("alpha"))
    alphas, ranks = (_patterns(config, name) for name in ("alpha_pattern", "rank_pattern"))
    rslora = _flag(config, "use_rslora")

    def scale(module: str, rank: int | None) -> tuple[dict[str, Any], str]:
        alpha = _by_pattern(alphas, module, default_alpha)
        configured = _by_pattern(ranks, module, config.get("r"))
        rank = configured if rank is None else rank
        agreed = configured in (None, rank)
        require_file(agreed, module, f"{CONFIG} says rank {configured!r}, its tensors are of rank {rank}")
        numbers = type(alpha) in (int, float) and type(rank) is int and abs(alpha) < _LARGE > rank > 0
        both = f"alpha is {alpha!r:.40} and the rank {rank!r:.40}"
        require_file(numbers, module, f"{both} in {CONFIG}, numbers were expected")
        assert rank is not None
        root = "√" if rslora else ""
        options: dict[str, Any] = {"alpha": alpha} | ({"rslora": True} if rslora else {})
        return (
            options | {"rank": rank},
            f"{alpha / (math.sqrt(rank) if rslora else rank):.4g}: alpha {alpha:g} / {root}{rank} by {CONFIG}",
        )

    return scale


def _by_pattern(patterns: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path, whole names at a time."""
    short, letters = len(module) <= _LONGEST, f"a name of {len(module)} letters"
    require_file(short or not patterns, f"{module:.60}…", f"{letters} is not matched with the patterns of {CONFIG}")
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)


def _patterns(config: Mapping[str, Any], name: str) -> dict[re.Pattern[str], Any]:
    """An option of regular expressions, compiled once."""
    given = config.get(name) or {}
    require_file(isinstance(given, dict), CONFIG, f"{name} is {given!r:.40}, a dictionary was expected")
    found = {}
    for pattern, value in given.items():
        slow = f"the pattern {pattern!r:.60} of {name} might be matched for ever; it is not read"
        require_file(_is_quick(pattern), CONFIG, slow)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of sets that may mean something else one day
                found[re.compile(rf"(.*\.)?({pattern})$")] = value
        except (re.error, OverflowError, RecursionError) as error:
            raise FileError(f"{CONFIG}: {pattern!r:.60} of {name} is not a regular expression: {error}") from error
    return found


def _is_quick(pattern: str) -> bool:
    """Whether a regular expression cannot backtrack for ever: no repeated group, and few ways to match one name."""
    plain = re.sub(r"\\.", "", pattern.replace("(?:", "("))
    groups, bars = plain.count("("), plain.count("|")
    few = len(re.findall(r"[*+?{]", plain)) <= 4 and (groups < 2 or (bars + 1) ** groups < 1e6)
    return len(pattern) <= _LONGEST and few and not re.search(r"\)[*+{]|\(\?", plain)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    boolean = value is None or isinstance(value, bool)
    require_file(boolean, CONFIG, f"{name} is {value!r:.40}, true or false was expected")
    return bool(value)


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
    kind, flipped = config["peft_type"], _flag(config, "fan_in_fan_out")
    require_file(not flipped or kind in FLIPPED, module, f"fan_in_fan_out with {kind} is not read: PEFT has none")
    if kind in _READERS:
        return replace(_READERS[kind](module, t, config), transposed=flipped)
    embedding = bool(set(embeddings.ENDS.values()) & set(t))
    if embedding:
        t = embeddings.as_linear(module, t)
    has, said = "magnitude" in t or "dora_scale" in t, f"use_dora={config.get('use_dora')!r} in {CONFIG}"
    require_file(has == _flag(config, "use_dora"), module, f"it has {'' if has else 'no '}magnitudes, and {said}")
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


def _oft(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """PEFT's rotation of the input, W·Rᵀ: by its series R(Q), or exactly by the inverse rotation R(−Q)."""
    vectors = _only(module, t, "oft_R")
    listed = f"oft_R of shape {tuple(vectors.shape)}"
    require_file(vectors.dim() == 2, module, f"{listed} is not read: (blocks, entries of a triangle) is")
    b = (1 + math.isqrt(1 + 8 * vectors.shape[1])) // 2
    require_file(b * (b - 1) // 2 == vectors.shape[1], module, f"{listed} is no upper triangle of blocks")
    shared = "block_share=True repeats one block over a width the file does not say; it is not read"
    require_file(not _flag(config, "block_share"), module, shared)
    if _flag(config, "coft"):
        eps = config.get("eps", 6e-5)
        fits = type(eps) in (int, float) and 0 < eps < _LARGE
        require_file(fits, CONFIG, f"eps is {eps!r:.40}, a positive number was expected")
        vectors = _projected(vectors, float(eps))
    series = "use_cayley_neumann" not in config or _flag(config, "use_cayley_neumann")
    options: dict[str, Any] = {"block_size": b, "side": "in"}
    if series:
        vectors, options["terms"] = _series(vectors, config.get("num_cayley_neumann_terms", 5))
    words = f"1: {'Cayley–Neumann series' if series else 'Cayley transform, of the inverse rotation'}, on the input"
    skew = vectors if series else -vectors
    shape = Shape(0, vectors.shape[0] * b)
    return Patch("oft", options, shape, {"skew": skew}, False, scale=words, on_kernel=_MERGED)


def _series(vectors: Tensor, terms: Any) -> tuple[Tensor, int]:
    """Return what has PEFT's rotation by so many terms: its 2 are I + 2Q, and its 3 are the same as its 4."""
    fits = type(terms) is int and 2 <= terms <= 1000
    require_file(fits, CONFIG, f"num_cayley_neumann_terms is {terms!r:.40}, an integer from 2 to 1000 was expected")
    return (vectors * 2, 2) if terms == 2 else (vectors, max(terms, 4))


def _only(module: str, t: Mapping[str, Tensor], role: str) -> Tensor:
    """The one tensor that a module of this type has."""
    require_file(set(t) == {role}, module, f"{', '.join(sorted(t))} was found, {role} alone was expected")
    return t[role]


def _projected(vectors: Tensor, eps: float) -> Tensor:
    """Constrained OFT: blocks outside a ball are moved to its surface, as PEFT does at every forward."""
    bound = eps / math.sqrt(vectors.shape[0])
    norm = math.sqrt(2) * torch.linalg.vector_norm(vectors.double(), dim=1, keepdim=True)
    return torch.where(norm > bound, vectors * (bound / norm.clamp(min=bound)), vectors.double()).to(vectors.dtype)


def _ia3(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """ia3_l (rows, 1) multiplies the output, bias and all; (1, channels) the input."""
    del config
    gain = _only(module, t, "ia3_l")
    vector = gain.dim() == 2 and 1 in gain.shape
    require_file(vector, module, f"ia3_l of shape {tuple(gain.shape)} is not read: (rows, 1) or (1, channels) is")
    out = gain.shape[0] != 1
    shape = Shape(gain.numel(), 0) if out else Shape(0, gain.numel())
    reason = "PEFT's (IA)³ scales it too, and a change of the weight cannot" if out else ""
    options = {"side": "out" if out else "in"}
    gate = gain.flatten().float() - 1
    words, per = "1: IA3 has no alpha", not out
    return Patch("ia3", options, shape, {"gate": gate}, False, scale=words, bias=reason, per_channel=per)


#: the types that PEFT does not write as kohya does -> their readers
_READERS: Mapping[str, Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], Patch]] = MappingProxyType(
    {"OFT": _oft, "IA3": _ia3, **peft_methods.READERS}
)


# -- writing ---------------------------------------------------------------------------------------------------------


def config(
    kind: str,
    ranks: Mapping[str, int],
    options: Mapping[str, Any],
    parameters: Sequence[str] = (),
    *,
    targets: Sequence[str] | None = None,
    model: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what adapter_config.json says of modules, with α = r for each, so that every scale is 1.

    Args:
        kind: PEFT's type.
        ranks: the rank of every module, by path.
        options: other entries that the type needs.
        parameters: the paths among them that are parameters, and no modules.
        targets: names by which PEFT finds the modules, None for a regular expression of their paths.
        model: what it says of the model.
    """
    modules = [path for path in ranks if path not in parameters]
    # Servers make room for r, and scale all modules by α/r. PEFT says of patterns for parameters that they match
    # nothing, though it follows them
    counted = Counter(ranks[path] for path in parameters)
    common = counted.most_common(1)[0][0] if counted else max(ranks.values())
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    scale: dict[str, Any] = {}
    if kind in _ALPHA:
        scale = {"r": common, _ALPHA[kind]: common, "rank_pattern": pattern, "alpha_pattern": pattern}
    return {
        "peft_type": kind,
        "base_model_name_or_path": None,
        "task_type": None,
        **model,
        "inference_mode": True,
        "target_modules": "|".join(map(re.escape, modules)) if targets is None else list(targets),
        **({"target_parameters": list(parameters)} if parameters else {}),
        **scale,
        **options,
    }
