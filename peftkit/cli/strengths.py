"""Files and their strengths, numbers and rules, as they are typed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peftkit.cli.terminal import warn
from peftkit.errors import OptionError

_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"


def strengths(adapters: list[str]) -> dict[str, float | dict[str, float]]:
    """Return {file: strength} of FILE, FILE=NUMBER, FILE=PATTERN=NUMBER,… and FILE=RULES.json."""
    found: dict[str, float | dict[str, float]] = {}
    for text in adapters:
        file, strength = _split(text)
        if file in found:
            raise OptionError(f"{file} was given twice: give it once, with the sum of its strengths")
        if not os.path.exists(file) and re.fullmatch(_NUMBER, file) and found:
            last = next(reversed(found))
            raise OptionError(f"{file!r} was given as a file: a strength is written with its file, as {last}={file}")
        found[file] = strength_of(strength)
        if found[file] == 0:
            warn(f"{text}: a strength of 0 changes nothing")
    return found


def strength_of(text: str) -> float | dict[str, float]:
    """Return a number, or {pattern: number}, of NUMBER, PATTERN=NUMBER,PATTERN=NUMBER… or RULES.json."""
    if text.endswith(".json"):
        return _rules(Path(text))
    if "=" not in text:
        return number(text)
    pairs = [part.rpartition("=") for part in text.split(",")]
    if not all(sign for _, sign, _ in pairs):
        raise OptionError(f"{text!r} was given, one number or PATTERN=NUMBER,PATTERN=NUMBER… was expected")
    return {pattern: number(value) for pattern, _, value in pairs}


def rules(texts: list[str]) -> dict[str, str]:
    """Return {old: new} of OLD=NEW, each given once."""
    found: dict[str, str] = {}
    for text in texts:
        old, sign, new = text.partition("=")
        if not sign or found.setdefault(old, new) != new:
            what = f"{old!r} was given two names" if sign else f"{text!r} was given to --rename"
            raise OptionError(f"{what}, OLD=NEW was expected, once for each OLD")
    return found


def _split(text: str) -> tuple[str, str]:
    """A file and its strength. Both may have "=" in them: the longest file that is there counts."""
    cuts = [len(text), *(i for i in range(len(text) - 1, 0, -1) if text[i] == "=")]
    found = next((cut for cut in cuts if os.path.exists(text[:cut])), None)
    if found is None:
        file, _, strength = text.rpartition("=")
        return (file, strength) if file and re.fullmatch(rf"{_NUMBER}|.*\.json", strength) else (text, "1")
    return text[:found], text[found + 1 :] or "1"


def _rules(path: Path) -> dict[str, float]:
    from peftkit.files.formats.strict_json import read_json

    given = read_json(path)
    if not isinstance(given, dict):
        raise OptionError(f"{path} holds a {type(given).__name__}, strengths by pattern were expected")
    return given


def number(text: str) -> float:
    """Return a number that was typed."""
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"{text!r} was given, a number was expected") from None
