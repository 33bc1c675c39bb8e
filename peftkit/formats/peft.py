"""PEFT's folders: adapter_config.json, which holds the scale, beside adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.adapters.lokr import factorize
from peftkit.errors import FileError
from peftkit.formats import kohya
from peftkit.formats.forms import Turn
from peftkit.formats.kohya import Modules, Scale
from peftkit.formats.patch import Patch
from peftkit.geometry import Shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

#: inits that move part of the base into the adapter: what the file adds to is then not the base
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "IA3")


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, checked as far as this library depends on it."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is not a configuration of PEFT: {error}") from error
    if not isinstance(config, dict):
        raise FileError(f"{path} is not a configuration of PEFT: it holds a {type(config).__name__}")
    kind = config.get("peft_type")
    if kind not in _TYPES:
        raise FileError(f"{path}: peft_type is {kind!r}; this library reads {', '.join(_TYPES)}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_BASE_CHANGING):
        raise FileError(
            f"{path}: init_lora_weights={init!r} moved part of the base into the adapter, so that the file does not "
            "say what it adds to the base; convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    for option in ("use_qalora", "alora_invocation_tokens", "use_bdlora", "layer_replication"):
        if config.get(option):
            raise FileError(f"{path}: {option}={config[option]!r} is more than a change of weights, and is not read")
    return config


def scale_of(config: Mapping[str, Any]) -> Scale:
    """γ from a configuration: lora_alpha (or alpha) / r, per module where a pattern says so."""
    default_alpha = config.get("lora_alpha", config.get("alpha"))
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    rslora = bool(config.get("use_rslora"))

    def scale(module: str, rank: int | None) -> tuple[dict[str, Any], str]:
        alpha = _by_pattern(alphas, module, default_alpha)
        rank = _by_pattern(ranks, module, config.get("r")) if rank is None else rank
        if not isinstance(alpha, (int, float)) or not isinstance(rank, int) or not math.isfinite(alpha) or rank < 1:
            raise FileError(f"{module}: alpha={alpha!r} and rank={rank!r} in {CONFIG}, numbers were expected")
        root = "√" if rslora else ""
        options: dict[str, Any] = {"alpha": alpha} | ({"rslora": True} if rslora else {})
        return (
            options,
            f"{alpha / (math.sqrt(rank) if rslora else rank):.4g}: alpha {alpha:g} / {root}{rank} by {CONFIG}",
        )

    return scale


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path, whole names at a time."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise FileError(f"{CONFIG}: {pattern!r} is not a regular expression: {error}") from error
    return default


def modules(keys: list[str]) -> tuple[Modules, list[str]]:
    """Keys -> {path in the model: {role: key}}, and those that are no adapter's."""
    found, unknown = kohya.split(keys)
    return {module.removeprefix(PREFIX): roles for module, roles in found.items()}, unknown


def patch(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """One module's tensors, by role, and the configuration -> its adapter."""
    kind = config["peft_type"]
    if kind == "OFT":
        return _oft(module, t, config)
    if kind == "IA3":
        return _ia3(module, t)
    found = kohya.patch(module, t, scale_of(config))
    if found is None:
        raise FileError(f"{module}: {', '.join(sorted(t))} is not what a {kind} adapter has")
    if found.kind == "lokr" and found.tensors.get("block") is not None and "outer" in found.tensors:
        found = _scaled_full_lokr(module, found, config)
    return _transposed(module, found) if config.get("fan_in_fan_out") else found


def _scaled_full_lokr(module: str, found: Patch, config: Mapping[str, Any]) -> Patch:
    """PEFT divides alpha by the configured rank even where no factor has one."""
    options, words = scale_of(config)(module, None)
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
    options |= {"rank": rank, "full_scale": "alpha/rank"}
    return Patch("lokr", found.options | options, found.shape, found.tensors, found.kernel_known, scale=words)


def _transposed(module: str, found: Patch) -> Patch:
    """fan_in_fan_out: the layer keeps its weight as (in, out), and B·A is of the transpose."""
    if found.kind != "lora" or found.options.get("tucker"):
        raise FileError(f"{module}: fan_in_fan_out with {found.kind} is not read")
    tensors = {"up": found.tensors["down"].mT, "down": found.tensors["up"].mT}
    shape = Shape(found.shape.channels, found.shape.rows)
    return Patch("lora", found.options, shape, tensors, found.kernel_known, scale=found.scale)


def _oft(module: str, t: Mapping[str, Tensor], config: Mapping[str, Any]) -> Patch:
    """PEFT's rotation of the input, W·Rᵀ: by its series R(Q), or exactly by the inverse rotation R(−Q)."""
    if set(t) != {"oft_R"}:
        raise FileError(f"{module}: {', '.join(sorted(t))} was found, oft_R alone was expected")
    vectors = t["oft_R"]
    b = (1 + math.isqrt(1 + 8 * vectors.shape[-1])) // 2 if vectors.dim() == 2 else 0
    if vectors.dim() != 2 or b * (b - 1) // 2 != vectors.shape[1]:
        raise FileError(f"{module}: oft_R of shape {tuple(vectors.shape)} is no upper triangle of blocks")
    if config.get("block_share"):
        raise FileError(
            f"{module}: block_share=True repeats one block over a width the file does not say; it is not read"
        )
    if config.get("coft"):
        vectors = _projected(vectors, float(config.get("eps", 6e-5)))
    series = config.get("use_cayley_neumann", True)
    options: dict[str, Any] = {"block_size": b, "side": "in"}
    if series:
        options["terms"] = int(config.get("num_cayley_neumann_terms", 5))
    words = f"1: {'Cayley–Neumann series' if series else 'Cayley transform, of the inverse rotation'}, on the input"
    skew = vectors if series else -vectors
    return Patch("oft", options, Shape(0, vectors.shape[0] * b), {"skew": skew}, kernel_known=False, scale=words)


def _projected(vectors: Tensor, eps: float) -> Tensor:
    """Constrained OFT: blocks outside a ball are moved to its surface, as PEFT does at every forward."""
    bound = eps / math.sqrt(vectors.shape[0])
    norm = math.sqrt(2) * torch.linalg.vector_norm(vectors.double(), dim=1, keepdim=True)
    return torch.where(norm > bound, vectors * (bound / norm.clamp(min=bound)), vectors.double()).to(vectors.dtype)


def _ia3(module: str, t: Mapping[str, Tensor]) -> Patch:
    """ia3_l (rows, 1) multiplies the output, bias and all; (1, channels) the input."""
    if set(t) != {"ia3_l"}:
        raise FileError(f"{module}: {', '.join(sorted(t))} was found, ia3_l alone was expected")
    gain = t["ia3_l"]
    out = gain.shape[0] != 1
    if gain.numel() != max(gain.shape) or gain.dim() != 2:
        raise FileError(f"{module}: ia3_l of shape {tuple(gain.shape)} is not read: (rows, 1) or (1, channels) is")
    shape = Shape(gain.numel(), 0) if out else Shape(0, gain.numel())
    reason = "PEFT's (IA)³ scales it too, and a change of the weight cannot" if out else ""
    options = {"side": "out" if out else "in"}
    gate = gain.flatten().float() - 1
    words, per = "1: IA3 has no alpha", not out
    return Patch("ia3", options, shape, {"gate": gate}, False, scale=words, bias=reason, per_channel=per)


# -- writing ---------------------------------------------------------------------------------------------------------


def config(kind: str, ranks: Mapping[str, int], options: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json of modules with these ranks, α = r for each, so that every scale is 1.

    ranks: path of a module -> its rank. options: what else the kind needs.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    alpha = "lora_alpha" if kind == "LORA" else "alpha"
    scale = {} if kind == "OFT" else {"r": common, alpha: common, "rank_pattern": pattern, "alpha_pattern": pattern}
    return {
        "peft_type": kind,
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        # A pattern matches whole paths; a list would match every path that ends so
        "target_modules": "|".join(re.escape(path) for path in ranks),
        **scale,
        **options,
    }


def skew(turn: Turn) -> Tensor:
    """oft_R of a rotation of the input: the upper triangles of Q, or of −Q for the exact one, which PEFT inverts."""
    i, j = torch.triu_indices(turn.Q.shape[1], turn.Q.shape[1], 1)
    upper = turn.Q[:, i, j]
    return upper if turn.terms is not None else -upper


def decompose_factor(shapes: Sequence[tuple[Sequence[int], tuple[int, int]]]) -> int | None:
    """The one factor from which PEFT makes all these Kronecker factors. shapes: that of C, and (rows, channels)."""
    candidates = [-1, *dict.fromkeys(u for C, _ in shapes for u in C)]
    for factor in candidates:
        if all((_split(rows, factor), _split(channels, factor)) == tuple(C) for C, (rows, channels) in shapes):
            return factor
    return None


def _split(size: int, factor: int) -> int:
    """The first factor PEFT splits a size into: a divisor as it is, else the most even split below it."""
    return factor if factor > 0 and size % factor == 0 else factorize(size, factor)[0]
