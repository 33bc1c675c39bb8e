"""The safetensors container: headers checked before anything is believed, files written whole or not at all.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}} and
the tensors' bytes without holes. Written files are a function of their content alone: the header's keys are ordered,
which the reference writer leaves to a hash map's seed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from peftkit.errors import FileError

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

#: how files of pickles begin: a zip archive, and the protocols 2 to 5
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Info:
    """One tensor of a file: its dtype by the container's name, its shape, and its bytes within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another one under its name, and from itself once it is written to."""

    device: int
    inode: int
    size: int
    written: int
    changed: int

    @classmethod
    def of(cls, file: int | Path) -> Stamp:
        """The stamp of an open file, by its descriptor, or of the one at a path."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class Container:
    """A safetensors file whose header has been read and found sound. Tensors are read when asked for."""

    path: Path
    infos: Mapping[str, Info]
    metadata: Mapping[str, str]
    data: int  # where the tensors' bytes begin
    stamp: Stamp  # of the file whose header this is

    def tensor(self, name: str, into: Tensor | None = None) -> Tensor:
        """One tensor, in memory of its own, or in that of `into`, bytes that are at least as many (uint8)."""
        info = self.infos[name]
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise FileError(f"{self.path}: {name} is {info.dtype}, which this library does not read")
        if not info.numel:
            return torch.empty(info.shape, dtype=dtype)
        bits = torch.empty(info.size, dtype=torch.uint8) if into is None else into[: info.size]
        with opened(self.path, self.stamp) as file:
            file.seek(self.data + info.start)
            if file.readinto(bits.numpy().data) != info.size:
                raise FileError(f"{self.path} ended inside {name}: it was cut off after its header was read")
        return bits.view(dtype).reshape(info.shape)

    def elements(self, name: str, index: list[int]) -> Tensor:
        """A few entries of one tensor, in the order of its memory, without reading the rest."""
        info = self.infos[name]
        dtype = DTYPES[info.dtype]
        chunks = []
        with opened(self.path, self.stamp) as file:
            for i in index:
                file.seek(self.data + info.start + i * dtype.itemsize)
                chunks.append(file.read(dtype.itemsize))
        if any(len(chunk) != dtype.itemsize for chunk in chunks):
            raise FileError(f"{self.path} ended inside {name}: it was cut off after its header was read")
        return torch.frombuffer(bytearray(b"".join(chunks)), dtype=dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.tensor(name) for name in self.infos}

    def copy(self, name: str, to: BinaryIO) -> None:
        """Append a tensor's bytes to another file, undecoded."""
        info = self.infos[name]
        with opened(self.path, self.stamp) as file:
            file.seek(self.data + info.start)
            _copy_bytes(file, to, info.size, self.path)

    def digest(self, name: str) -> str:
        """sha256 of one tensor's bytes, undecoded."""
        info = self.infos[name]
        hasher = hashlib.sha256()
        left = info.size
        with opened(self.path, self.stamp) as file:
            file.seek(self.data + info.start)
            while left > 0 and (block := file.read(min(CHUNK, left))):
                hasher.update(block)
                left -= len(block)
        return hasher.hexdigest()


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
            raise FileError(
                f"{path} is a pickle, not a safetensors file; pickles can run code and are never unpickled, "
                "unless as data only with allow_pickle=True"
            )
        if not sound:
            raise FileError(f"{path} is not a safetensors file: {size} bytes cannot hold a header of {length}")
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


@contextmanager
def opened(path: Path, stamp: Stamp | None = None) -> Iterator[BufferedReader]:
    """Open a file to read; FileError for what is no file (a pipe would never end) and for what cannot be read.

    stamp: the one the file had when it was first opened. FileError if the file has another one now, or after the block,
    so that what is read at several times is of one file.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, no name is too long or too odd for it
        raise FileError(f"there is no file {path}, or it may not be read")
    try:
        with open(path, "rb") as file:
            stamp = Stamp.of(file.fileno()) if stamp is None else stamp
            _require_unchanged(file, path, stamp)
            yield file
            _require_unchanged(file, path, stamp)
    except OSError as error:
        raise FileError(f"{path} could not be read: {error}") from error


def read_json(path: Path) -> Any:
    """What a small JSON file beside a model holds."""
    with opened(path) as file:
        text = file.read()
    return parse(text, path)


def parse(text: bytes | str, path: object) -> Any:
    """JSON in which no object has a key twice; FileError otherwise. path: for the error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{twice!r} is in it twice")
        return found

    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not sound JSON: {error}") from None


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
    """The first bytes of a file, length and all. tensors: name -> (dtype, shape, bytes), in the order of the data."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        if name == "__metadata__":
            raise FileError("a tensor cannot be called '__metadata__': that name is the container's")
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
    """A tensor's bytes, row by row."""
    whole = tensor.detach().cpu().contiguous()
    # not reshape(-1), which keeps the stride of a single number, whatever it is
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data


def require_stamp(path: Path, stamp: Stamp) -> None:
    """Raise FileError if a file is not the one that had this stamp, or was written to since."""
    with opened(path, stamp):
        pass


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when the block ends, on disk to the last byte; before, nothing has it."""
    _require_folder(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder, a file was expected")
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"{path} could not be written: {error}; what was there before is unchanged") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes its name when the block ends. Refuses to replace one that has anything in it."""
    _require_folder(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileError(f"{path} is there already: name a new folder, or remove it first")
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -- parts ----------------------------------------------------------------------------------------------------------


def _require_unchanged(file: BinaryIO, path: Path, stamp: Stamp) -> None:
    if Stamp.of(file.fileno()) != stamp:
        raise FileError(
            f"{path} was replaced, written to or cut off while it was being read; nothing was made of it. "
            "Run this again when no other program writes there"
        )


def _require_folder(path: Path) -> None:
    if "\0" in str(path) or not os.path.isdir(path.parent):
        raise FileError(f"there is no folder {path.parent} to write {path.name!r} in")


def _temporary(path: Path) -> Path:
    """A name beside a file that is no longer than its own may be."""
    return path.with_name(f".peftkit.{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make a rename last: the folder is what records it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    value = parse(text, f"the header of {path}")
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
