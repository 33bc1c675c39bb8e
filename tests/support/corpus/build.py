"""Safetensors files whose header says what it is told to."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftkit.files.formats import container as files

#: a tensor, or what a header says of one: its dtype, its shape and its bytes
Entry = Tensor | tuple[str, list[int], bytes]
Files = Mapping[str, bytes]

NAN, INF = float("nan"), float("inf")


def ones(*shape: int, by: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, by).to(dtype)


def safetensors(tensors: Mapping[str, Entry], metadata: Any = None) -> bytes:
    """A file whose header says what it is told to."""
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = []
    end = 0
    for name, entry in tensors.items():
        if isinstance(entry, Tensor):
            raw = bytes(files.raw(entry)) if entry.numel() else b""
            entry = (files.NAMES[entry.dtype], list(entry.shape), raw)
        dtype, shape, raw = entry
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        data.append(raw)
        end += len(raw)
    return with_header(json.dumps(head).encode(), b"".join(data))


def with_header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_of(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON and the data of a sound file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]
