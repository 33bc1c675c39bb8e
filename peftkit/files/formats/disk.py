"""Files on disk: one and the same file for as long as it is read, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from peftkit.errors import FileError


@dataclass(frozen=True)
class Stamp:
    """The marks by which a file differs from another one of its name, and from itself once it is written to."""

    device: int
    inode: int
    size: int
    written: int
    changed: int

    @classmethod
    def of(cls, file: int | Path) -> Stamp:
        """Return the stamp of an open file, by its descriptor, or of the file at a path."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def opened(path: Path, stamp: Stamp | None = None) -> Iterator[BufferedReader]:
    """Open a file to read.

    Args:
        path: the file.
        stamp: the one the file had when it was first opened, so that what is read at several times is of one file.

    Raises:
        FileError: if there is no file (a pipe would never end), if it cannot be read, or if its stamp is another one
            before or after the block.
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


def require_stamp(path: Path, stamp: Stamp) -> None:
    """Raise FileError if a file is not the one that had this stamp, or was written to since."""
    with opened(path, stamp):
        pass


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, which takes its name when the block ends, on disk to the last byte.

    Raises:
        FileError: if the file cannot be written. What had its name before is then unchanged.
    """
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
    """Make a folder to fill, which takes its name when the block ends.

    Raises:
        FileError: if the folder cannot be written, or if one of its name has anything in it.
    """
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
