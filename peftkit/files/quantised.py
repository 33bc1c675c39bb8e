"""Quantised weights of a checkpoint: which of its tensors they are made of, and the base with plain weights instead."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from peftkit.errors import OptionError, QuantisedMergeError, UnsupportedLayerError
from peftkit.files.base import Base, Shard, open_base
from peftkit.files.formats import container, strict_json
from peftkit.files.formats.container import Info
from peftkit.files.stored import MARK, Stored, stored_weights

#: entries of a file's header that say how its weights are quantised
_IN_HEADER = ("_quantization_metadata", "tensor_names")
#: tensors by which formats are known that are not read: the last part of a name -> what it is
_UNREAD: Mapping[str, str] = MappingProxyType(
    {
        "qweight": "GPTQ or AWQ",
        "weight_packed": "compressed-tensors",
        "weight_scale_2": "NVFP4",
        "gate_up_proj_blocks": "MXFP4",
        "down_proj_blocks": "MXFP4",
    }
)


def open_plain(path: object, *, allow_pickle: bool = False, variant: str | None = None) -> Base:
    """Return the checkpoint at a path, with its quantised weights dequantised as they are read; see `open_base`.

    Raises:
        UnsupportedLayerError: weights in a format that is not read.
        FileError: as `open_base`.
    """
    base = open_base(path, allow_pickle=allow_pickle, variant=variant)  # type: ignore[arg-type]
    for _, key in unread_modules(base):
        raise UnsupportedLayerError(unread(base, key))
    return dequantised(base, stored_weights(base))


def dequantised(base: Base, weights: Mapping[str, Stored]) -> Base:
    """Return the base with plain weights in place of these quantised ones, and without the tensors they are made of."""
    if not weights:
        return base
    gone = {key for each in weights.values() for key in each.keys}
    gone |= {key for key in base.where if key.rpartition(".")[2] == MARK}
    stored: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    where: dict[str, tuple[str, str]] = {}
    first = {each.keys[0]: key for key, each in weights.items()}
    for old, (shard, name) in base.where.items():
        if old in first:
            own = first[old].removeprefix(base.shards[shard][1])
            stored[shard][own], where[first[old]] = weights[first[old]], (shard, own)
        elif old not in gone:
            where[old] = (shard, name)
    kept = {at for key, at in base.where.items() if key not in gone}
    shards: dict[str, tuple[Shard, str]] = {}
    for home, (shard, prefix) in base.shards.items():
        infos = {name: info for name, info in shard.infos.items() if (home, name) in kept}
        infos |= {name: _info(each, base.info(each.keys[0]).start) for name, each in stored[home].items()}
        shards[home] = (_PlainShard(shard, stored[home], infos), prefix)
    return replace(base, shards=shards, where=where)


def plain_config(path: Path) -> None:
    """Take out of a model's config.json what it says of quantisation."""
    config = strict_json.read_json(path)
    if isinstance(config, dict) and "quantization_config" in config:
        del config["quantization_config"]
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def is_dequantised(base: Base, shard: str) -> bool:
    """Return whether a file of a base holds quantised weights that are read as plain ones."""
    return isinstance(base.shards[shard][0], _PlainShard)


def require_plain_dtype(base: Base, weights: Collection[str], dtype: torch.dtype) -> None:
    """Raise OptionError if quantised weights are to be written in a dtype that is no plain one."""
    if weights and dtype.itemsize < 2:
        raise OptionError(
            f"dtype={dtype} was given, torch.bfloat16, torch.float16 or torch.float32 was expected: {base.path} holds "
            "quantised weights, and plain ones of that dtype are written in their place"
        )


def refuse_quantised(base: Base, key: str, where: str, weights: Mapping[str, Stored]) -> None:
    """Raise QuantisedMergeError for a quantised weight: a merge writes a plain one where `dtype` says so."""
    if key in weights:
        raise QuantisedMergeError(
            f"{where}: {key} of {base.path} is quantised ({weights[key].title}), and its numbers are not the weight: "
            "pass dtype=torch.bfloat16 to write plain weights in place of the quantised ones, or merge into the "
            "checkpoint that they were made of"
        )


def unread(base: Base, key: str) -> str:
    """Return why a weight of another program's format is not read, for a message; "" for any other tensor."""
    path, _, last = key.rpartition(".")
    title = _UNREAD.get(last, "")
    if last == "qweight":
        title = "GPTQ" if f"{path}.g_idx" in base.where else "AWQ" if f"{path}.qzeros" in base.where else title
    return title and (
        f"{key} of {base.path} is quantised as {title}, which is not read: merge into the 16-bit checkpoint that it "
        "was made of and quantise the result"
    )


def unread_modules(base: Base) -> Iterator[tuple[str, str]]:
    """Yield the modules whose weights are in a format that is not read, each with the tensor that shows it."""
    for key in base.where:
        path, _, last = key.rpartition(".")
        if last in _UNREAD:
            yield (key.removesuffix("_blocks") if last.endswith("_blocks") else path), key


# -- parts ----------------------------------------------------------------------------------------------------------


def _info(stored: Stored, start: int) -> Info:
    """What a plain weight is in its file, in the place where the quantised one begins."""
    size = math.prod(stored.shape) * stored.dtype.itemsize
    return Info(container.NAMES[stored.dtype], stored.shape, start, start + size)


@dataclass(frozen=True)
class _PlainShard:
    """A file with plain weights in place of its quantised ones, dequantised when they are read. Implements `Shard`."""

    shard: Shard
    stored: Mapping[str, Stored]
    infos: Mapping[str, Info]

    @property
    def metadata(self) -> Mapping[str, str]:
        own = self.shard.metadata
        return {key: value for key, value in own.items() if key not in _IN_HEADER and key not in self.stored}

    def tensor(self, name: str, into: Tensor | None = None) -> Tensor:
        own = self.stored.get(name)
        return self.shard.tensor(name, into) if own is None else own.read().to(own.dtype).reshape(own.shape)

    def elements(self, name: str, index: list[int]) -> Tensor:
        return self.tensor(name).flatten()[index] if name in self.stored else self.shard.elements(name, index)

    def digest(self, name: str) -> str:
        if name not in self.stored:
            return self.shard.digest(name)
        return hashlib.sha256(container.raw(self.tensor(name))).hexdigest()

    def copy(self, name: str, to: BinaryIO) -> None:
        if name in self.stored:
            container.put(to, container.raw(self.tensor(name)))
        else:
            self.shard.copy(name, to)
