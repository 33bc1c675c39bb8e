"""A GGUF file as ggml reads it: header, metadata, tensors. Little endian, version 3."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .result import Refused

#: the types of metadata, in the order of ggml's enumeration; 8 is a string and 9 an array
_NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
STRING, ARRAY, FLOAT32 = 8, 9, 6
#: the types of tensors that an adapter may have, by ggml's numbers
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True)
class Gguf:
    """metadata: key -> (type, value). tensors: in the order of the file, as torch has them: (…, ne1, ne0)."""

    metadata: dict[str, tuple[int, Any]]
    tensors: dict[str, Tensor]


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(_NUMBERS[kind] or "")


def read_gguf(path: Path) -> Gguf:
    data = path.read_bytes()
    cursor = _Cursor(data)
    if cursor.number("I") != int.from_bytes(b"GGUF", "little") or cursor.number("I") != 3:
        raise Refused("invalid magic characters or version")
    count, entries = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, tuple[int, Any]] = {}
    for _ in range(entries):
        key, kind = cursor.text(), cursor.number("I")
        if key in metadata:
            raise Refused(f"duplicate key {key!r}")
        metadata[key] = kind, cursor.value(kind)
    infos = []
    for _ in range(count):
        name = cursor.text()
        if len(name.encode()) >= 64:
            raise Refused(f"tensor name {name!r} is too long")  # GGML_MAX_NAME
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))]
        infos.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", (4, 32))[1]
    start = math.ceil(cursor.at / alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors or offset % alignment:
            raise Refused(f"tensor {name!r} is there twice, or not aligned")
        dtype = _DTYPES[kind]
        own = data[start + offset : start + offset + math.prod(shape) * dtype.itemsize]
        tensors[name] = torch.frombuffer(bytearray(own), dtype=dtype).reshape(shape[::-1])
    return Gguf(metadata, tensors)
