"""Turn the formulas of a page into MathML while mkdocs builds it: browsers show them without a script.

mkdocs calls `on_page_content` (see `hooks` in mkdocs.yml) with what pymdownx.arithmatex has marked.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

#: \(…\) in a span, \[…\] in a div
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """The page's HTML with MathML in place of LaTeX."""
    return _FORMULA.sub(_as_mathml, content)


def _as_mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return convert(html.unescape(found[2]).strip(), display=display)
