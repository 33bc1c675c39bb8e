"""Files of tensors, written and read with the reference implementation of safetensors, and compared bit for bit."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def load(path: Path) -> State:
    return load_file(path)


def load_folder(path: Path) -> State:
    """All shards of a folder."""
    return {key: tensor for file in sorted(path.rglob("*.safetensors")) for key, tensor in load(file).items()}


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def metadata(path: Path) -> dict[str, str]:
    return header(path).get("__metadata__", {})


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs)))


def require_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless both hold the same tensors, bit for bit."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    unlike = [key for key in ours if not same_bits(ours[key], theirs[key])]
    assert not unlike, f"{len(unlike)} of {len(ours)} tensors differ: {unlike[:5]}"


def listing(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sharded(folder: Path, tensors: State, cut: int) -> Path:
    """Two shards with an index, as transformers writes them."""
    keys = list(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = {files[0]: keys[:cut], files[1]: keys[cut:]}
    for file, own in parts.items():
        write(folder / file, {key: tensors[key] for key in own}, {"format": "pt"})
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {key: file for file, own in parts.items() for key in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def keyed(module: str, tensors: Mapping[str, Tensor]) -> State:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}
