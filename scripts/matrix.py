"""Try every adapter kind in every place where people train: print the table, and renew docs/matrix.md.

    python scripts/matrix.py [column …]

"✓" is right by the assertions of the column's function in tests/support/matrix.py; a number is a typed refusal, whose
reason is below the table. Anything else ends the script. With columns named, the page stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peftkit as pk
from tests.support import matrix

PAGE = Path(__file__).resolve().parents[1] / "docs" / "matrix.md"
#: column -> kind -> why it is refused
Found = Mapping[str, Mapping[str, str]]


def measured(columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """The cells of these columns."""
    found: dict[str, dict[str, str]] = {}
    for column in track(columns, description="matrix", transient=True):
        if column in matrix.DIVIDED:
            found[column] = matrix.divided_cells(column, pk.kinds())
        else:
            found[column] = {kind: matrix.cell(column, kind) for kind in pk.kinds()}
    return found


def table(found: Found) -> str:
    """The cells in Markdown, with the reasons of refusals under them."""
    reasons = list(dict.fromkeys(why for cells in found.values() for why in cells.values() if why))
    lines = [f"| kind | {' | '.join(found)} |", "| --- |" + " :-: |" * len(found)]
    for kind in sorted(pk.kinds()):
        marks = [f"({reasons.index(why) + 1})" if (why := cells[kind]) else "✓" for cells in found.values()]
        lines.append(f"| `{kind}` | {' | '.join(marks)} |")
    return "\n".join([*lines, *([""] if reasons else []), *(f"{i}. {why}" for i, why in enumerate(reasons, 1))])


def page(text: str, found: Found) -> str:
    """The page with its table made again."""
    start, end = "<!-- matrix -->\n", "\n<!-- /matrix -->"
    before, _, rest = text.partition(start)
    return before + start + "\n" + table(found) + "\n" + end + rest.partition(end)[2]


def main() -> None:
    columns = sys.argv[1:] or matrix.COLUMNS
    found = measured(columns)
    print(table(found))
    if len(columns) == len(matrix.COLUMNS):
        PAGE.write_text(page(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
