"""The process of a command: its exit code, its one line of error, and its end by a signal.

Imports nothing large, so that Ctrl-C while the rest is imported ends as it does later.
"""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

#: options that the library's messages call by their names in Python, and the flags they are here
_FLAGS = {"overwrite": "--force"} | {
    name: "--" + name.replace("_", "-")
    for name in (
        *("ignore", "dora_axis", "alpha_zero", "alpha", "allow_pickle", "base", "other_base", "origin", "rebase"),
        *("rank", "energy", "threshold", "factor", "exact", "dtype", "kind", "target", "targets", "family"),
        *("component", "bake", "method", "density", "seed", "variant"),
    )
}
#: the dtypes, and what they are called here
_DTYPES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
_OPTION = re.compile(rf"(?<![\w./=-])({'|'.join(_FLAGS)})=(?:True\b|('[^'\s]*'|\d[\d.]*\b|{'|'.join(_DTYPES)}))?")
_RENAME = re.compile(r"(?<![\w./=-])rename=\{'([^']*)': '([^']*)'\}")


def run() -> None:
    """Run the command that the arguments name, and end the process with its code."""
    try:
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _end)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a console that cannot show ‖ΔW‖ shows a question mark
        _run()
    except KeyboardInterrupt:
        sys.exit(130)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Leave every block on the way out, so that temporaries are removed; then end as a shell expects."""
    del frame
    sys.exit(128 + number)


def _run() -> None:
    import typer

    from peftkit.cli.main import app
    from peftkit.errors import PeftkitError

    usage: Any = typer.BadParameter.__bases__[0]  # its module is typer's or click's, by typer's version
    as_json = "--json" in sys.argv[1:] and sys.argv[1:2] != ["bench"]  # which takes a file
    try:
        sys.exit(app(prog_name="peftkit", standalone_mode=not as_json) or 0)
    except (PeftkitError, OSError) as error:
        _fail(in_flags(str(error)), type(error).__name__, as_json)
    except usage as error:
        _fail(error.format_message(), "UsageError", as_json)


def _fail(message: str, kind: str, as_json: bool) -> NoReturn:
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "type": kind}, ensure_ascii=False, indent=2) + "\n")
    else:
        from peftkit.cli.terminal import ERR

        ERR.print(f"error: {message}", soft_wrap=True)
    sys.exit(2)


def in_flags(message: str) -> str:
    """Return a message of the library with its options as flags.

    Example:
        >>> from peftkit.cli.process import in_flags
        >>> in_flags("name another file, or pass overwrite=True; dora_axis='up' was given")
        "name another file, or pass --force; --dora-axis 'up' was given"
    """
    message = _RENAME.sub(r"--rename '\1=\2'", message)
    return _OPTION.sub(
        lambda found: _FLAGS[found[1]] + (f" {_DTYPES.get(found[2], found[2])}" if found[2] else ""), message
    )
