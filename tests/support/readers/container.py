"""Reading a safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def read_raw(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in the order of the file, as stored, and the metadata."""
    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.offset_keys()}, file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in the order of the file, in float64."""
    return {key: tensor.to(torch.float64) for key, tensor in read_raw(path)[0].items()}


def by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module name -> {tensor name: tensor}; the first dot ends the module's name."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, name = key.partition(".")
        grouped.setdefault(module, {})[name] = tensor
    return grouped
