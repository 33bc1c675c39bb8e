"""What a model's folder holds beside its tensors: configurations, tokenizers, indices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from peftkit.files.base import Base
from peftkit.files.formats import disk, strict_json
from peftkit.files.quantised import is_dequantised, plain_config
from peftkit.files.weight_files import is_index


def copy_rest(base: Base, folder: Path, sizes: Mapping[str, int]) -> None:
    """Copy what a folder holds beside its tensors. sizes: of the new shards' tensors, in bytes."""
    homes = {str(PurePosixPath(name).parent) for name in base.shards}
    plain = {str(PurePosixPath(name).parent) for name in base.shards if is_dequantised(base, name)}
    for name, stamp in base.others.items():
        source, target, home = base.path / name, folder / name, str(PurePosixPath(name).parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        disk.require_stamp(source, stamp)
        if is_index(target.name) and home in homes:
            _rewrite_index(base, target, home, sizes, renamed=home in plain)
        elif target.name == "config.json" and home in plain:
            plain_config(target)


def _rewrite_index(base: Base, path: Path, home: str, sizes: Mapping[str, int], *, renamed: bool) -> None:
    """Say in a copied index what the new shards hold, and how large they are where it was said of the old ones."""
    index = strict_json.read_json(path)
    files = {str(PurePosixPath(home) / name): name for name in index["weight_map"].values()}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        index["metadata"]["total_size"] = sum(sizes[file] for file in files)
    elif not renamed:
        return
    if renamed:
        index["weight_map"] = {key: name for file, name in files.items() for key in base.shards[file][0].infos}
    path.write_text(json.dumps(index, indent=2) + "\n")
