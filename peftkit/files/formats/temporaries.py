"""Names of files that are being written, and what killed writers left of them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import zlib
from contextlib import suppress
from pathlib import Path


def temporary_beside(path: Path) -> Path:
    """A name beside a file that says which process writes it: no longer than a name may be, whatever the file's is."""
    return path.with_name(f".peftkit.{os.getpid()}.{_host()}.{secrets.token_hex(4)}.tmp")


def remove_stale(folder: Path) -> None:
    """Remove the temporaries that killed processes of this host left in a folder."""
    for path in folder.glob(f".peftkit.*.{_host()}.*.tmp"):
        writer = re.fullmatch(r"\.peftkit\.(\d{1,9})\.[0-9a-f]{8}\.[0-9a-f]{8}\.tmp", path.name)
        if writer is None or _is_running(int(writer[1])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _host() -> str:
    """A short name of where process numbers mean what they mean here: this host, and this container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {space}'.encode()):08x}"


def _is_running(process: int) -> bool:
    """Whether a process of this host is alive; True where the system cannot be asked without harm."""
    if os.name != "posix":  # elsewhere signal 0 ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
