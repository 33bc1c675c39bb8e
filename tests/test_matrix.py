"""Every kind in every place: what docs/matrix.md says is so."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

import peftkit as pk
from tests.support import matrix
from tests.support.paths import ROOT

KINDS = sorted(kind for kind in pk.kinds() if pk.adapters.registry.get(kind).__module__.startswith("peftkit."))
PAGE = (ROOT / "docs" / "matrix.md").read_text()

# what torch.compile itself does to trace an autograd function
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def said(column: str, kind: str) -> str:
    """What the page says of a cell: "" or the reason of its refusal."""
    names = [name.strip() for name in re.findall(r"^\| kind \|(.*)\|$", PAGE, re.MULTILINE)[0].split("|")]
    row = re.findall(rf"^\| `{kind}` \|(.*)\|$", PAGE, re.MULTILINE)[0].split("|")
    mark = row[names.index(column)].strip()
    if mark == "✓":
        return ""
    reasons = re.findall(r"^(\d+)\. (.*)$", PAGE, re.MULTILINE)
    return dict(reasons)[mark.strip("()")]


def test_the_page_has_every_column_and_every_kind() -> None:
    head = re.findall(r"^\| kind \|(.*)\|$", PAGE, re.MULTILINE)[0].split("|")
    assert tuple(name.strip() for name in head) == matrix.COLUMNS
    assert {*matrix.QUICK, *matrix.LONG, *matrix.DIVIDED} == set(matrix.COLUMNS)
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE) == KINDS
    for name in matrix.COLUMNS:
        assert re.search(rf"^\| [^|]*\b{re.escape(name)}\b[^|]* \| [^|]+ \|$", PAGE, re.MULTILINE), name


@pytest.mark.parametrize("column", matrix.QUICK)
def test_quick(column: str) -> None:
    for kind in KINDS:
        assert matrix.cell(column, kind) == said(column, kind), kind


@pytest.mark.slow
@pytest.mark.parametrize("column", matrix.LONG)
def test_long(column: str) -> None:
    for kind in KINDS:
        assert matrix.cell(column, kind) == said(column, kind), kind


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("column", matrix.DIVIDED)
def test_divided(column: str) -> None:
    assert matrix.divided_cells(column, KINDS) == {kind: said(column, kind) for kind in KINDS}


def test_a_wrong_answer_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "close", lambda *_: (_ for _ in ()).throw(AssertionError("wrong")))
    with pytest.raises(AssertionError, match="wrong"):
        matrix.cell("autocast", "lora")


def test_the_table_is_written_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script: Any = importlib.import_module("matrix")
    found = {"a": dict.fromkeys(pk.kinds(), ""), "b": dict.fromkeys(pk.kinds(), "why not")}
    text = script.page("x\n<!-- matrix -->\nbefore\n<!-- /matrix -->\ny\n", found)
    assert text.startswith("x\n<!-- matrix -->\n\n| kind | a | b |\n") and text.endswith("<!-- /matrix -->\ny\n")
    assert "before" not in text and "1. why not" in text and "| `lora` | ✓ | (1) |" in text
