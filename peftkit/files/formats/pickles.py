"""Pickles (.pt, .ckpt, .bin), read as data: plain tensors by name, and nothing that runs or swells."""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from io import BufferedReader
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats.disk import opened

#: what a damaged pickle makes torch's unpickler raise
_STUMBLES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, EOFError, OSError)
_STUMBLES += (RuntimeError, struct.error)

#: of the format before archives: a number, a version, a system, the objects, the keys
_PICKLES_IN_A_FILE = 5


def unpickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .pt, .ckpt or .bin file as data; an object that is no plain tensor raises FileError."""
    with opened(path) as file:
        _refuse_bombs(file, path)
        file.seek(0)
        loaded = _loaded(file, path)  # the very file that was looked through
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise FileError(f"{path} holds a {type(loaded).__name__}, a dictionary of tensors was expected")
    found: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            require_file(
                not _holds_tensors(value),
                path,
                f"{str(key)!r:.60} holds tensors inside a {type(value).__name__}; it is not read",
            )
            continue
        require_file(str(key) not in found, path, f"{str(key)!r:.60} is in it twice")
        plain = value.layout == torch.strided and value.device.type == "cpu"
        require_file(
            plain and value.untyped_storage().nbytes() >= value.nbytes,
            path,
            f"{str(key)!r:.60} is no plain tensor, or it holds fewer numbers than it says",
        )
        found[str(key)] = value.detach()
    return found


def _loaded(file: BufferedReader, path: Path) -> Any:
    """What torch makes of an open file as data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of protocols that it may not know: it says so if it does not
            return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise FileError(f"{path} holds more than tensors, or is damaged; what else it does was not run") from error
    except _STUMBLES as error:
        raise FileError(f"{path} could not be read as data: {(str(error) or repr(error)).splitlines()[0]}") from error


def _refuse_bombs(file: BufferedReader, path: Path) -> None:
    """Refuse pickles that would take far more memory than their file: torch neither compresses nor asks for zeros."""
    pickles: list[IO[bytes]] = [file]
    if zipfile.is_zipfile(file):
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FileError(f"{path} could not be read as data: {error}") from error
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise FileError(f"{path} is a compressed archive, which torch does not write; it was not unpacked")
        pickles = [io.BytesIO(archive.read(entry)) for entry in entries if entry.filename.endswith(".pkl")]
    else:
        file.seek(0)
    for stream in pickles:
        try:
            for _ in range(_PICKLES_IN_A_FILE):
                for operation, argument, _ in pickletools.genops(stream):
                    if operation.name in ("GLOBAL", "INST") and str(argument).endswith(" bytearray"):
                        raise FileError(f"{path} asks for memory and not for tensors; it was not unpickled")
        except (ValueError, EOFError, UnicodeError):  # damaged, or the raw numbers after the last one: torch will say
            continue


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor anywhere inside. Nothing here is called again for its parts: they may be deep."""
    left, seen = [value], set[int]()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            return True
        if isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            left += [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return False
