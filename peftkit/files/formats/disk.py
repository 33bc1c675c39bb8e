"""Files on disk: one and the same file for as long as it is read, and written whole or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from peftkit.errors import FileError, did_you_mean
from peftkit.files.formats.temporaries import remove_stale, temporary_beside

#: how many names of a folder are looked at for the one that was meant
_LISTED = 1000


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
        raise FileError(f"there is no file {path}, or it may not be read.{_neighbours(path)}".removesuffix("."))
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


def require_output(out: str | os.PathLike[str], inputs: Iterable[object] = (), overwrite: bool | None = None) -> Path:
    """Check that a verb may write to a path. This is the rule of every verb that writes.

    - What does not exist yet may be written, and so may an empty folder.
    - overwrite=None, the library's default: a file is replaced, as `torch.save` does, unless it is one of the inputs or
      part of one. A folder that has something in it is not replaced.
    - overwrite=False, the command line's default: nothing that exists is replaced.
    - overwrite=True, `--force` on the command line: inputs and folders are replaced too. A folder is replaced only if
      each of its files is written anew, so no other file is lost with it.
    - What is read-only is never replaced.

    Args:
        out: the file or the folder to write.
        inputs: what is read to make it; whatever is no path (a model, None) is left out.
        overwrite: see above.

    Returns:
        The path of `out`.

    Raises:
        FileError: `out` may not be written, or the folder it would be in does not exist.

    Example:
        >>> from peftkit.files.formats.disk import require_output
        >>> require_output("adapter.safetensors", ["tuned.safetensors"], overwrite=False)
        PosixPath('adapter.safetensors')
    """
    path = Path(out)
    _require_folder(path)
    if not os.path.exists(path) or (path.is_dir() and not any(path.iterdir())):
        return path
    if not os.access(path, os.W_OK) or not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise FileError(f"{path} is read-only: name another output, or make it writable first")
    if overwrite:
        return path
    read = next((each for each in inputs if isinstance(each, (str, os.PathLike)) and _is_of(path, Path(each))), None)
    if read is not None:
        which = "one of the inputs" if os.path.samefile(path, read) else f"part of {os.fspath(read)}, which is an input"
        raise FileError(f"{path} is {which}, and would be replaced: name another output, or pass overwrite=True")
    if overwrite is False or path.is_dir():
        raise FileError(f"{path} is there already: name another output, or pass overwrite=True to replace it")
    return path


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write, which takes its name when the block ends, on disk to the last byte.

    Raises:
        FileError: if the file cannot be written. What had its name before is then unchanged.
    """
    _require_folder(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder, a file was expected")
    remove_stale(path.parent)
    temporary = temporary_beside(path)
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
        FileError: if the folder cannot be written, or if one of its name holds a file that is not written anew.
    """
    _require_folder(path)
    if path.is_file():
        raise FileError(f"{path} is a file, a folder was expected")
    remove_stale(path.parent)
    temporary = temporary_beside(path)
    try:
        temporary.mkdir()
        yield temporary
        new = _files(temporary)
        for name in new:
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        lost = sorted(_files(path) - new) if path.is_dir() else []
        if lost:
            raise FileError(f"{path} holds {lost[0]}, which would be lost: name a new folder, or move that file first")
        _replace_folder(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FileError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _neighbours(path: Path) -> str:
    """A hint naming the files beside a path that are called almost as it is."""
    if "\0" in str(path) or not os.path.isdir(path.parent):
        return ""
    with suppress(OSError), os.scandir(path.parent) as entries:
        names = [entry.name for entry in itertools.islice(entries, _LISTED)]
        return did_you_mean(path.name, sorted(name for name in names if not name.startswith(".")))
    return ""


def _require_unchanged(file: BinaryIO, path: Path, stamp: Stamp) -> None:
    if Stamp.of(file.fileno()) != stamp:
        raise FileError(
            f"{path} was replaced, written to or cut off while it was being read; nothing was made of it. "
            "Run this again when no other program writes there"
        )


def _require_folder(path: Path) -> None:
    if "\0" in str(path) or not os.path.isdir(path.parent):
        raise FileError(f"there is no folder {path.parent} to write {path.name!r} in")


def _is_of(path: Path, source: Path) -> bool:
    """Whether a path that exists is an input, or lies in the folder that is one."""
    if not os.path.exists(source):
        return False
    folder = source.parent if source.name.endswith(".index.json") else source
    own, whole = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return os.path.samefile(path, source) or (folder.is_dir() and (own == whole or whole in own.parents))


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _replace_folder(new: Path, path: Path) -> None:
    """Give a folder the name of another, which is set aside until then and comes back if that fails."""
    aside = new.with_suffix(".old") if path.is_dir() else None
    if aside is not None:
        os.replace(path, aside)
    try:
        os.replace(new, path)
    except OSError:
        if aside is not None:
            os.replace(aside, path)
        raise
    if aside is not None:
        shutil.rmtree(aside)


def _sync_folder(folder: Path) -> None:
    """Make a rename last: the folder is what records it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
