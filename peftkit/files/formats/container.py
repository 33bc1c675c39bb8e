"""The safetensors container: headers are checked before anything in a file is believed.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}} and
the tensors' bytes without holes. Written files are a function of their content alone: the header's keys are ordered,
which the reference writer leaves to a hash map's seed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats import strict_json
from peftkit.files.formats.disk import Stamp, atomic, opened

#: the largest header the reference implementation reads
MAX_HEADER = 100_000_000

#: bytes handed to the kernel at a time: 1.7 GB go to ext4 in 0.5 s so, and in 2 to 3 s by one call a tensor
CHUNK = 1 << 20

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})

#: what files that torch.save wrote are called
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
#: how files of pickles begin: a zip archive, and the protocols 2 to 5
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
#: what to do with a base in llama.cpp's format
GGUF_ADVICE = "merge into the safetensors checkpoint that it was made from, and convert the result to GGUF"
#: how other files begin that come under the name of a safetensors file, and what they are
_OTHERS: Mapping[bytes, str] = MappingProxyType(
    {
        b"GGUF": f"a GGUF file, llama.cpp's format: {GGUF_ADVICE}",
        b"version https://git-lfs": "a pointer of Git LFS and not the file itself: fetch it by `git lfs pull`",
        b"<!DOCTYPE html": "a web page, as a download without a login gives: download the file again",
        b"<html": "a web page, as a download without a login gives: download the file again",
    }
)


@dataclass(frozen=True)
class Info:
    """One tensor of a file: its dtype by the container's name, its shape, and its bytes within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Container:
    """A safetensors file whose header has been read and found sound. Tensors are read when asked for."""

    path: Path
    infos: Mapping[str, Info]
    metadata: Mapping[str, str]
    data: int  # where the tensors' bytes begin
    stamp: Stamp  # of the file whose header this is

    def tensor(self, name: str, into: Tensor | None = None) -> Tensor:
        """Read one tensor, into memory of its own, or into `into`, at least as many bytes (uint8)."""
        with opened(self.path, self.stamp) as file:
            return self._read(file, name, into)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Read several tensors, by default all, in one go."""
        with opened(self.path, self.stamp) as file:
            return {name: self._read(file, name) for name in (self.infos if names is None else names)}

    def _read(self, file: BufferedReader, name: str, into: Tensor | None = None) -> Tensor:
        info = self.infos[name]
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise FileError(f"{self.path}: {name} is {info.dtype}, which this library does not read")
        if not info.numel:
            return torch.empty(info.shape, dtype=dtype)
        bits = torch.empty(info.size, dtype=torch.uint8) if into is None else into[: info.size]
        file.seek(self.data + info.start)
        self._require_whole(name, file.readinto(bits.numpy().data) == info.size)
        return bits.view(dtype).reshape(info.shape)

    def _require_whole(self, name: str, whole: bool) -> None:
        require_file(whole, self.path, f"it ended inside {name}: it was cut off after its header was read")

    def elements(self, name: str, index: list[int]) -> Tensor:
        """Read a few entries of one tensor, in the order of its memory, without the rest."""
        info = self.infos[name]
        dtype = DTYPES[info.dtype]
        chunks = []
        with opened(self.path, self.stamp) as file:
            for i in index:
                file.seek(self.data + info.start + i * dtype.itemsize)
                chunks.append(file.read(dtype.itemsize))
        self._require_whole(name, all(len(chunk) == dtype.itemsize for chunk in chunks))
        return torch.frombuffer(bytearray(b"".join(chunks)), dtype=dtype)

    def copy(self, name: str, to: BinaryIO) -> None:
        """Append a tensor's bytes to another file, undecoded."""
        info = self.infos[name]
        with opened(self.path, self.stamp) as file:
            file.seek(self.data + info.start)
            _copy_bytes(file, to, info.size, self.path)

    def digest(self, name: str) -> str:
        """Return the sha256, in hex, of one tensor's bytes, undecoded."""
        info = self.infos[name]
        hasher = hashlib.sha256()
        left = info.size
        with opened(self.path, self.stamp) as file:
            file.seek(self.data + info.start)
            while left > 0 and (block := file.read(min(CHUNK, left))):
                hasher.update(block)
                left -= len(block)
        return hasher.hexdigest()


def packed(tensor: Tensor, dtype: torch.dtype | None, path: object, name: str) -> Tensor:
    """Return a tensor as a file is to have it: in main memory, in a dtype; FileError where it is not finite there.

    Args:
        tensor: what is to be written.
        dtype: None for the one it has.
        path: of the file, for errors.
        name: of the tensor, for errors.
    """
    own = tensor.detach().to("cpu", tensor.dtype if dtype is None else dtype).contiguous()
    finite = bool(torch.isfinite(own).all())
    require_file(finite, path, f"{name} is not finite as {own.dtype}; nothing was written")
    return own


def require_name(path: Path, what: str) -> None:
    """Raise FileError unless a file that is to be written is called *.safetensors. what: for the message."""
    named = path.suffix == ".safetensors" and not path.is_dir()
    require_file(named, path, f"{what} is called *.safetensors, {path.suffix or 'no suffix'!r} was given")


def read(path: str | os.PathLike[str]) -> Container:
    """Read and check the header of a safetensors file.

    Raises FileError for anything that is not one: too short, a header that is oversized, not JSON or has a name twice,
    sizes that do not fit shapes, overlaps, holes, trailing bytes. Never unpickles.
    """
    path = Path(path)
    with opened(path) as file:
        stamp = Stamp.of(file.fileno())
        size = stamp.size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        sound = 2 <= length <= min(MAX_HEADER, size - 8)
        if not sound and head.startswith(_PICKLES):
            named = "" if path.suffix in PICKLED else f", under a name such as {path.with_suffix('.pt').name}"
            raise FileError(
                f"{path} is a pickle, not a safetensors file; pickles can run code and are never unpickled, "
                f"unless as data only with allow_pickle=True{named}"
            )
        if not sound:
            beginning = head + file.read(24)
            also = next((what for start, what in _OTHERS.items() if beginning.startswith(start)), None)
            what = f"{size} bytes cannot hold a header of {length}" if also is None else f"it is {also}"
            raise FileError(f"{path} is not a safetensors file: {what}")
        header = _parse(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(f"the header of {path} is damaged: its metadata is not text")
    infos = {name: _info(name, entry, path) for name, entry in header.items()}
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise FileError(f"the header of {path} is damaged: {name} at byte {info.start} {what}, which ends at {end}")
        end = info.stop
    if end != size - 8 - length:
        raise FileError(
            f"{path} holds {size - 8 - length} bytes of tensors, its header says {end}: it is damaged or cut off"
        )
    return Container(path, infos, metadata, 8 + length, stamp)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, all or nothing. The same tensors and metadata give the same bytes."""
    with atomic(path) as file:
        emit(file, tensors, metadata)


def emit(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the container into an open file: the widest dtypes first, as the reference does, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    shapes = {name: (NAMES[tensors[name].dtype], tuple(tensors[name].shape), tensors[name].nbytes) for name in order}
    file.write(header(shapes, metadata))
    for name in order:
        put(file, raw(tensors[name]))


def header(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a file, length and all.

    tensors: name -> (dtype, shape, bytes), in the order of the data.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        require_file(name != "__metadata__", name, "a tensor cannot have this name, which is the container's")
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"a name or an entry of the header is not text that a file can hold: {error}") from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise FileError(f"a header of {len(text)} bytes is larger than any loader reads, {MAX_HEADER}")
    return struct.pack("<Q", len(text)) + text


def put(file: BinaryIO, data: memoryview) -> None:
    """Write bytes, chunk by chunk."""
    for start in range(0, len(data), CHUNK):
        file.write(data[start : start + CHUNK])


def raw(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row by row."""
    whole = tensor.detach().cpu().contiguous()
    # not reshape(-1), which keeps the stride of a single number, whatever it is
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data


# -- parts ----------------------------------------------------------------------------------------------------------


def _copy_bytes(source: BinaryIO, target: BinaryIO, size: int, path: Path) -> None:
    """size bytes from one file to another, within the kernel where it can."""
    target.flush()
    start, left = source.tell(), size
    while left:
        if sys.platform == "linux":
            done = os.sendfile(target.fileno(), source.fileno(), start + size - left, min(left, CHUNK))
        else:
            done = target.write(source.read(min(left, CHUNK)))
        if not done:
            raise FileError(f"{path} ended early: it was cut off while it was copied")
        left -= done
    target.seek(0, os.SEEK_END)


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    value = strict_json.parse(text, f"the header of {path}")
    if not isinstance(value, dict) or not text.startswith(b"{"):
        raise FileError(f"{path} is not a safetensors file: its header is not a JSON object")
    return value


def _info(name: str, entry: Any, path: Path) -> Info:
    damaged = f"the header of {path} is damaged: {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{damaged} does not have a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(offsets) != 2 or len(shape) > 64:
        raise FileError(f"{damaged} has a shape or offsets that are not sizes")
    if not isinstance(dtype, str) or offsets[0] > offsets[1]:
        raise FileError(f"{damaged} has a dtype or offsets that cannot be")
    info = Info(dtype, tuple(shape), offsets[0], offsets[1])
    if math.prod(n for n in shape if n) >= 2**63:
        raise FileError(f"{damaged} has a shape of more elements than can be counted")
    known = DTYPES.get(dtype)
    if known is not None and info.numel * known.itemsize != info.size:
        raise FileError(f"{damaged} is {info}, which is not {info.size} bytes")
    return info
