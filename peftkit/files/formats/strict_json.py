"""JSON without a key that is there twice, which readers would take differently."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from peftkit.errors import FileError
from peftkit.files.formats.disk import opened


def read_json(path: Path) -> Any:
    """Return what a small JSON file beside a model holds. Raises FileError as `parse` does."""
    with opened(path) as file:
        text = file.read()
    return parse(text, path)


def parse(text: bytes | str, path: object) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text, in UTF-8 where it is bytes.
        path: where it is from, for the error.

    Raises:
        FileError: if the text is no JSON, or an object in it has a key twice.
    """

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
