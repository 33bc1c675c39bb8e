"""vLLM, SGLang and llama.cpp's converter of October 2026: how they read a folder of PEFT of a language model.

`weights` are the matrices of the model's Linears by their paths in transformers. Both hold adapters in buffers that are
made before a file is read, and multiply by one scale.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .container import read_tensors
from .result import Read, Refused, result

PREFIX = "base_model.model."


def _folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((path / "adapter_config.json").read_text()), read_tensors(path / "adapter_model.safetensors")


# -- llama.cpp: convert_lora_to_gguf.py, and then llama_adapter_lora_weight::get_scale ---------------------------------


def read_converter(path: Path, weights: Mapping[str, Tensor], family: None = None, strength: float = 1.0) -> Read:
    """In the model's own names and rows, which the converter renames and reorders as those of the model."""
    del family
    config, tensors = _folder(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, end = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if end in ("lora_A", "lora_B"):
            pairs.setdefault(name, {})[end] = tensor
        elif ".base_layer.weight" not in key:
            raise Refused(f"Unexpected name '{key}': Not a lora_A or lora_B tensor")
    alpha = config["lora_alpha"]  # the file's, and no pattern is read
    deltas = {
        name: strength * alpha / pair["lora_B"].shape[1] * pair["lora_B"] @ pair["lora_A"]
        for name, pair in pairs.items()
    }
    lost = set(deltas) - set(weights)
    if lost:
        raise Refused(f"{sorted(lost)} do not exist in base model")
    return result(deltas, {}, tensors, tensors)


# -- vLLM: lora/peft_helper.py, lora/lora_model.py, lora/utils.py ------------------------------------------------------


def read_vllm(path: Path, weights: Mapping[str, Tensor], family: None = None, strength: float = 1.0) -> Read:
    del family
    config, tensors = _folder(path)
    if not {"r", "lora_alpha", "target_modules"} <= set(config):
        raise Refused("Missing required configuration fields")
    rank = config["r"]
    for wrong, reason in (
        (config.get("modules_to_save"), "vLLM only supports modules_to_save being None."),
        (config.get("use_dora"), "vLLM does not yet support DoRA."),
        (config.get("bias", "none") != "none", "Adapter bias is not supported."),
        (rank > 512, f"LoRA rank {rank} is greater than max_lora_rank 512."),
    ):
        if wrong:
            raise Refused(reason)
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    expected = {name.rpartition(".")[2] for name in weights}
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(PREFIX).split(".")
        if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise Refused(f"{key} is unsupported LoRA weight")
        if parts[-3] not in expected:
            raise Refused(f"expected target modules in {sorted(expected)} but received {parts[-3]}")
        pairs.setdefault(".".join(parts[:-2]), {})[parts[-2]] = tensor
    deltas: dict[str, Tensor] = {}
    used: list[str] = []
    for name, pair in pairs.items():
        if name not in weights:
            continue  # no layer asks for it
        a, b = pair["lora_A"], pair["lora_B"]
        if a.shape[0] > rank or (b.shape[0], a.shape[1]) != weights[name].shape:
            raise Refused(f"{name}: {tuple(a.shape)} and {tuple(b.shape)} do not fit the buffers")
        deltas[name] = strength * scale * b @ a
        used += [f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"]
    return result(deltas, {}, tensors, used)


# -- SGLang: lora/lora_config.py, lora/lora.py, lora/mem_pool.py, lora/utils.py ----------------------------------------

#: what a name in target_modules becomes; others stay
_STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_STACKED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
#: what get_hidden_dim knows of a model of attentions and a dense feed-forward
_KNOWN = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def read_sglang(path: Path, weights: Mapping[str, Tensor], family: None = None, strength: float = 1.0) -> Read:
    del family
    config, tensors = _folder(path)
    targets, rank = config["target_modules"], config["r"]
    if config["peft_type"].lower() != "lora" or config.get("use_dora"):
        raise Refused("only LoRA")
    if isinstance(targets, str):
        raise Refused("Only 'all' or 'all-linear' can be used as the string for target module")
    for pattern, default in (("rank_pattern", rank), ("alpha_pattern", config["lora_alpha"])):
        if any(value != default for value in (config.get(pattern) or {}).values()):
            raise Refused(f"{pattern} overrides are not supported")
    normalised = {_STACKED.get(last := name.rpartition(".")[2], last) for name in targets}
    if not normalised <= _KNOWN:
        raise Refused(f"get_hidden_dim not implemented for {sorted(normalised - _KNOWN)}")
    scale = strength * config["lora_alpha"] / rank
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.search(r"layers\.(\d+)\.", key)
        if found:
            layers.setdefault(found.group(1), {})[key] = tensor
    deltas: dict[str, Tensor] = {}
    used: list[str] = []
    for layer in layers.values():
        stacked, taken = _normalised(layer)
        for key in [key for key in stacked if key.endswith(".lora_A.weight")]:
            module = key.removesuffix(".lora_A.weight").removeprefix(PREFIX)
            name = module.rpartition(".")[2]
            if name not in normalised:
                continue  # such a weight has no buffer
            for part, delta in _products(module, stacked[key], stacked[key.replace("lora_A", "lora_B")], rank, weights):
                deltas[part] = scale * delta
        used += [key for key in taken if _STACKED.get(n := key.split(".")[-3], n) in normalised]
    return result(deltas, {}, tensors, used)


def _normalised(layer: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a layer with those of q, k and v, and of gate and up, one below the other; and the keys used."""
    weights = dict(layer)
    has_k = any("k_proj" in key for key in layer)
    used = [key for key in layer if not any(f".{name}" in key for name in ("k_proj", "v_proj", "up_proj"))]
    for key in layer:
        if "q_proj" in key:
            k, v = key.replace("q_proj", "k_proj"), key.replace("q_proj", "v_proj")
            if v not in weights:
                raise Refused(f"KeyError: {v!r}")
            own = weights.pop(k) if has_k else torch.zeros_like(weights[v])
            weights[key.replace("q_proj", "qkv_proj")] = torch.cat((weights.pop(key), own, weights.pop(v)))
            used += [k, v] if has_k else [v]
        elif "qkv_proj" in key and "lora_A" in key:
            weights[key] = weights[key].repeat(3, 1)
        elif "gate_proj" in key:
            up = key.replace("gate_proj", "up_proj")
            used += [up] if up in weights else []
            other = weights.pop(up, torch.zeros_like(weights[key]))
            weights[key.replace("gate_proj", "gate_up_proj")] = torch.cat((weights.pop(key), other))
        elif "gate_up_proj" in key and "lora_A" in key:
            weights[key] = weights[key].repeat(2, 1)
    return weights, used


def _products(
    module: str, a: Tensor, b: Tensor, rank: int, weights: Mapping[str, Tensor]
) -> Iterable[tuple[str, Tensor]]:
    """B·A of the layers of transformers that one layer of SGLang stands for, by their paths."""
    around, _, name = module.rpartition(".")
    parts = _PARTS.get(name, 1)
    names = [module] if module in weights else [f"{around}.{n}" for n, stacked in _STACKED.items() if stacked == name]
    rows = [weights[n].shape[0] for n in names]
    if a.shape != (parts * rank, weights[names[0]].shape[1]) or b.shape != (sum(rows), rank):
        raise Refused(f"AssertionError: {module}: {tuple(a.shape)} and {tuple(b.shape)} do not fit the buffers")
    if module in weights:  # whose parts all have the same A
        return [(module, b @ a[:rank])]
    return [
        (n, own @ a[i * rank : (i + 1) * rank]) for i, (n, own) in enumerate(zip(names, b.split(rows), strict=True))
    ]
