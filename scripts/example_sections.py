"""Let the API pages show "Example:" in a docstring as code: the parser of Google's style knows "Examples:" only."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"^Example:$", re.MULTILINE)


class ExampleSections(Extension):
    """Renames the section while the package is read for the site; the source stays as it is."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section in one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub("Examples:", obj.docstring.value)
