"""llama.cpp of October 2026: llama_adapter_lora_init, then the products that its graphs add to those of a weight.

`weights` are the tensors of the model's own GGUF under their names there, as `tests.support.language.converted` makes
them; what is returned is in the same names and the same order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .gguf import FLOAT32, STRING, read_gguf
from .result import Read, Refused, result


def read(path: Path, weights: Mapping[str, Tensor], architecture: str | None, strength: float = 1.0) -> Read:
    file = read_gguf(path)

    def text(key: str) -> str:
        kind, value = file.metadata.get(key, (STRING, ""))
        if kind != STRING:
            raise Refused(f"{key} is no string")
        return value

    for key, expected in (
        ("general.type", "adapter"),
        ("general.architecture", architecture),
        ("adapter.type", "lora"),
    ):
        if text(key) != expected:
            raise Refused(f"expect {key} to be {expected!r}, but got {text(key)!r}")
    kind, alpha = file.metadata.get("adapter.lora.alpha", (FLOAT32, 0.0))
    if kind != FLOAT32:
        raise Refused("adapter.lora.alpha is no float32")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        name, _, end = key.rpartition(".")
        if end in ("lora_a", "lora_b"):
            pairs.setdefault(name, {})[end[-1]] = tensor.to(torch.float64)
        elif not key.endswith("_norm.weight"):
            raise Refused(f"LoRA tensor {key!r} has unexpected suffix")
    deltas: dict[str, Tensor] = {}
    used: list[str] = []
    for name, pair in pairs.items():
        deltas[name] = _delta(name, pair, weights, alpha, strength)
        used += [f"{name}.lora_a", f"{name}.lora_b"]
    return result(deltas, {}, file.tensors, used)


def _delta(
    name: str, pair: Mapping[str, Tensor], weights: Mapping[str, Tensor], alpha: float, strength: float
) -> Tensor:
    if set(pair) != {"a", "b"}:
        raise Refused(f"LoRA tensor pair for {name!r} is missing one component")
    if name not in weights:
        raise Refused(f"LoRA tensor {name!r} does not exist in base model")
    a, b = pair["a"], pair["b"]
    rows, columns = weights[name].shape
    rank = b.shape[1]
    scale = strength * alpha / rank if alpha else strength
    if name.endswith("token_embd.weight"):
        if (b.shape[0], a.shape[0]) != (columns, rows):
            raise Refused(f"tensor {name!r} has incorrect shape")
        if "output.weight" not in weights:
            raise Refused("GGML_ASSERT(ggml_can_mul_mat(a, b)): the output is multiplied by the embedding's factors")
        return scale * a @ b.T  # get_rows of a, one token after the other, then b
    if (b.shape[0], a.shape[1]) != (rows, columns):
        raise Refused(f"tensor {name!r} has incorrect shape")
    if a.shape[0] != rank:
        raise Refused("lora_a tensor is not transposed")
    return scale * b @ a
