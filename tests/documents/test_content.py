"""The documents are complete: every kind, option, error, command and public name; tables are those of the results."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.core import TyperGroup

import peftkit as pk
from peftkit import errors
from peftkit.adapters import registry
from peftkit.cli import app
from peftkit.files.formats import native
from peftkit.files.formats.native import WeightRecord
from peftkit.geometry import Shape

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: kinds of the library itself; other tests register some of their own
KINDS = [kind for kind in pk.kinds() if registry.get(kind).__module__.startswith("peftkit.")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_page_that_states_its_options_and_their_defaults(kind: str) -> None:
    page = (DOCS / "algorithms" / f"{kind}.md").read_text()
    parameters = inspect.signature(registry.get(kind).__init__).parameters.values()
    options = {p.name: repr(p.default) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \| \S", page, re.MULTILINE)) == options
    assert f"({kind}.svg)" in page and (DOCS / "algorithms" / f"{kind}.svg").is_file()
    assert page.count("$$") == 2
    assert registry.get(kind).paper in page
    when = page.partition("## When to use it\n\n")[2].partition("\n\n")[0]
    assert len(when.split()) > 20 and when.endswith(".")
    assert f"**On another base** it {registry.get(kind).on_another_base}." in page or kind in ("loldu", "dora")
    assert f"algorithms/{kind}.md" in (ROOT / "mkdocs.yml").read_text()


def test_every_error_is_explained() -> None:
    page = (DOCS / "guides" / "errors.md").read_text()
    assert all(getattr(pk, name) is not None for name in pk.__all__)  # errors outside errors.py are imported with these
    classes, new = {errors.PeftkitError}, {errors.PeftkitError}
    while new := {child for parent in new for child in parent.__subclasses__()}:
        classes |= new
    own = {error.__name__ for error in classes if error.__module__.startswith("peftkit.")}
    assert len(own) >= 17
    assert own == set(re.findall(r"^\| `(\w+Error)`", page, re.MULTILINE))
    for row in re.findall(r"^\| `\w+Error`.*$", page, re.MULTILINE):
        assert len([cell for cell in row.strip("|").split("|") if cell.strip()]) == 3


def test_every_public_name_is_in_the_api() -> None:
    named = set(re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.MULTILINE))
    public = {name for name in dir(pk) if callable(getattr(pk, name))}
    assert {f"peftkit.{name}" for name in public} <= named
    monitor = {name for name in vars(pk.monitor) if name[0].isupper() or name in ("spectra", "read_run", "replay")}
    assert {f"peftkit.monitor.{name}" for name in monitor} <= named


def test_every_command_is_on_its_page() -> None:
    page = (DOCS / "guides" / "command_line.md").read_text()

    def commands(command: Any, name: str) -> list[str]:
        if not isinstance(command, TyperGroup):
            return [name]
        return [full for own, inner in command.commands.items() for full in commands(inner, f"{name} {own}")]

    found = commands(typer.main.get_command(app), "peftkit")
    assert len(found) >= 14
    assert [name for name in found if name not in page and not name.startswith("peftkit bench")] == []


def test_pictures_are_those_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    pictures = importlib.import_module("structure_pictures")
    assert set(pictures.PICTURES) == set(KINDS)
    for kind, equation in pictures.PICTURES.items():
        assert (DOCS / "algorithms" / f"{kind}.svg").read_text() == pictures.picture(equation)


def test_measured_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    tables = importlib.import_module("readme_tables")
    for document, parts in tables.MEASURED.items():
        assert (ROOT / document).read_text() == tables.renewed(document, parts), f"{document}: run `make readme`"


@pytest.mark.slow
def test_tables_of_what_programs_read_and_rules_do_are_those_of_trying_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    tables = importlib.import_module("readme_tables")
    for document, parts in tables.support().items():
        assert (ROOT / document).read_text() == tables.renewed(document, parts), f"{document}: run `make readme`"


def test_the_specification_names_every_key_of_a_header() -> None:
    page = (DOCS / "native_format.md").read_text()
    shape = Shape(4, 6, (3, 3), 2)
    records = {"a": WeightRecord("lora", "c", {}, shape, transposed=True, read=True, embedding=True, quantised=True)}
    optional = {"extras": ("b",), "shared": {"c": ("a", False)}, "common": {"shared.up": ["a.up"]}}
    header = json.loads(
        native.encode(native.Header("style", records, {"a": np.zeros(32, "f4")}, **optional))[native.KEY]
    )
    assert list(header) == re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)
    (group,) = header["groups"]
    assert "{" + ", ".join(f'"{key}"' for key in group) + "}" in page
    assert header["schema"] == native.SCHEMA_COMMON == 2


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert links and [link for link in links if not link.startswith("https:") and not (ROOT / link).exists()] == []
