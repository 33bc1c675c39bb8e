"""What a model's folder holds beside its tensors: configurations, tokenizers, indices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from peftkit.files.base import Base
from peftkit.files.formats import disk, strict_json


def copy_rest(base: Base, folder: Path, sizes: Mapping[str, int]) -> None:
    """Copy what a folder holds beside its tensors. sizes: of the new shards' tensors, in bytes."""
    indexed = {str(Path(name).parent) for name in base.shards}
    for name, stamp in base.others.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.path / name, target)
        disk.require_stamp(base.path / name, stamp)
        if name.endswith(".safetensors.index.json") and str(Path(name).parent) in indexed:
            _rewrite_sizes(target, str(Path(name).parent), sizes)


def _rewrite_sizes(path: Path, component: str, sizes: Mapping[str, int]) -> None:
    """Say in a copied index how large the new shards are, where the index says it of the old ones."""
    index = strict_json.read_json(path)
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        own = {str(Path(component) / name) for name in index["weight_map"].values()}
        index["metadata"]["total_size"] = sum(sizes[name] for name in own)
        path.write_text(json.dumps(index, indent=2) + "\n")
