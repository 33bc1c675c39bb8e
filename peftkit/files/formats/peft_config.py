"""PEFT's adapter_config.json: what it says of types, scales and the model; reading it, and writing it."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peftkit.errors import FileError, did_you_mean, require_file
from peftkit.files.formats import strict_json
from peftkit.files.formats.structures import Scale

CONFIG = "adapter_config.json"

#: what is read
TYPES = (
    *("LORA", "LOHA", "LOKR", "OFT", "IA3", "TRAINABLE_TOKENS"),
    *("ADALORA", "MISS", "VERA", "RANDLORA", "FOURIERFT", "VBLORA", "TINYLORA"),
)
#: the entries of a configuration that are about the model
_OF_MODEL = ("base_model_name_or_path", "task_type", "auto_mapping", "revision")
LARGE = 2**62
#: no real name or pattern is longer, and matching takes long
_LONGEST = 1000

#: inits that move part of the base into the adapter: what the file adds to is then not the base
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: the types whose modules are scaled by α/r -> the option that has α
_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
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
    require_file(kind in TYPES, path, f"peft_type is {kind!r}; this library reads {', '.join(TYPES)}")
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
    rslora = flag(config, "use_rslora")

    def scale(module: str, rank: int | None) -> tuple[dict[str, Any], str]:
        alpha = _by_pattern(alphas, module, default_alpha)
        configured = _by_pattern(ranks, module, config.get("r"))
        rank = configured if rank is None else rank
        agreed = configured in (None, rank)
        require_file(agreed, module, f"{CONFIG} says rank {configured!r}, its tensors are of rank {rank}")
        numbers = type(alpha) in (int, float) and type(rank) is int and abs(alpha) < LARGE > rank > 0
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


def flag(config: Mapping[str, Any], name: str) -> bool:
    """Return an entry that is true or false, false where it is missing. Raises FileError for anything else."""
    value = config.get(name)
    boolean = value is None or isinstance(value, bool)
    require_file(boolean, CONFIG, f"{name} is {value!r:.40}, true or false was expected")
    return bool(value)


def number(value: Any, name: str, module: str) -> float:
    """Return a number of a configuration. Raises FileError for anything else."""
    is_number = type(value) in (int, float) and abs(value) < LARGE
    require_file(is_number, module, f"{name} is {value!r:.40}, a number was expected")
    return float(value)


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
