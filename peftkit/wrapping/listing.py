"""Listings of weights for a terminal of 80 columns: facts in columns, and every name whole, on a line of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Column, Table

#: columns of the narrowest terminal that nothing is cut on, less the indent of names
_WIDTH = 78


@dataclass(frozen=True)
class Row:
    """One weight or module. facts: what others may have too. measures: numbers of its own, None for an unknown one."""

    name: str
    facts: tuple[str, ...]
    measures: tuple[float | None, ...] = ()


def listing(
    facts: Sequence[str], measures: Mapping[str, Callable[[float], str]], rows: Iterable[Row], *, every: bool
) -> Table:
    """Return a table for rich to print, two lines a row: facts and measures in columns, and the name under them.

    Args:
        facts: the titles of the facts.
        measures: the titles of the measures, and how each is written.
        rows: what to list.
        every: list each row. Otherwise rows of the same facts are one, with their count, the span of their measures and
            the first name.

    Example:
        >>> from peftkit.wrapping.listing import Row, listing
        >>> rows = [Row("to_q", ("lora",), (0.1,)), Row("to_k", ("lora",), (0.3,))]
        >>> table = listing(["kind"], {"norm": "{:.1f}".format}, rows, every=False)
        >>> [line.strip() for line in next(iter(table.columns[0].cells)).splitlines()]
        ['2      lora  0.1 to 0.3', 'to_q, …']
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.facts, i if every else None), []).append(row)
    counted = [] if every else ["count"]
    lines = [(*counted, *facts, *measures)]
    for same in groups.values():
        shown = [_span([row.measures[i] for row in same], write) for i, write in enumerate(measures.values())]
        lines.append((*([] if every else [str(len(same))]), *same[0].facts, *shown))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    header, *aligned = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    table = Table(Column(header, overflow="fold"), box=None, pad_edge=False)
    for line, same in zip(aligned, groups.values(), strict=True):
        name = same[0].name + (", …" if len(same) > 1 else "")
        table.add_row("\n".join([*([line] if line else []), *_lines(name)]))
    return table


def _span(values: Sequence[float | None], write: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    ends = [write(min(known)), write(max(known))] if known else [""]
    return " to ".join(dict.fromkeys(ends))


def _lines(name: str) -> list[str]:
    """A name, indented; one that is wider than the terminal goes on after a separator."""
    lines = [""]
    for part in re.findall(r"[^._/ ]*[._/ ]|[^._/ ]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > _WIDTH:
            lines.append("")
        lines[-1] += part
    return [f"  {line}" for line in lines]
