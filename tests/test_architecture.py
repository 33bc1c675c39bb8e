"""What one kind of adapter, one structure of ΔW or one program needs is stated where it is defined, and asked there.

Code elsewhere that compares the name of a kind or of a program, or tests for a class of ΔW, has to be changed for every
new one. The few places that still do so are listed here, each with its reason; the list may only become shorter.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter
from peftkit.adapters.form import Form
from peftkit.delta import Delta
from peftkit.files.export.programs import TARGETS

PACKAGE = Path(__file__).resolve().parents[1] / "peftkit"

#: file -> how many such tests it has, and why they are there
ALLOWED: dict[str, tuple[int, str]] = {
    "bench/models.py": (1, "the file that is timed holds what LoLDU derives from its base, as the peer's does"),
    "bench/ops.py": (1, "the operations that are timed are of these structures alone"),
    "bench/peers.py": (2, "what a peer calls its own option for the kind, and what it cannot do"),
    "monitor/spectrum.py": (3, "singular values come from factors where there are few ranks, without the matrix"),
    "wrapping/plan.py": (1, '"full" is the name of a preset there'),
}


def names_below(cls: type) -> set[str]:
    return {cls.__name__}.union(*(names_below(below) for below in cls.__subclasses__()))


def strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def names(node: ast.AST) -> set[str]:
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))
    }


#: names of kinds, in this library and in PEFT's configurations
KINDS = {spelled for kind in registry.kinds() for spelled in (kind, kind.upper())}


def compares_kinds(node: ast.AST) -> bool:
    """Whether it compares something with the name of an adapter kind, or looks for one among several."""
    return isinstance(node, ast.Compare) and bool(strings(node) & KINDS)


def compares_programs(node: ast.AST) -> bool:
    """Whether it compares the name of a program."""
    if not isinstance(node, ast.Compare) or not strings(node) & set(TARGETS):
        return False
    return any(
        (isinstance(side, ast.Attribute) and side.attr == "name")
        or (isinstance(side, ast.Name) and side.id == "target")
        for side in (node.left, *node.comparators)
    )


def asks_for_a_structure(node: ast.AST) -> bool:
    """Whether it tests for a class of ΔW, of an adapter or of a form."""
    if not isinstance(node, ast.Call) or not names(node.func) & {"isinstance", "issubclass"}:
        return False
    classes = set().union(*(names_below(cls) for cls in (Delta, Adapter, Form)))
    return bool(names(node.args[1]) & classes)


def violations(source: str, room: str) -> Iterator[int]:
    """The lines of a file outside the room that defines what is asked for."""
    checks = [compares_programs]
    checks += [compares_kinds] if room != "adapters" else []
    checks += [asks_for_a_structure] if room not in ("adapters", "delta") else []
    for node in ast.walk(ast.parse(source)):
        if any(check(node) for check in checks):
            yield node.lineno  # type: ignore[attr-defined]


def test_what_a_kind_is_is_asked_of_the_kind() -> None:
    found = Counter[str]()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        found.update({name: len(list(violations(path.read_text(), name.partition("/")[0])))})
    assert {name: count for name, count in found.items() if count} == {
        name: count for name, (count, _) in ALLOWED.items()
    }


def test_the_list_is_short() -> None:
    assert sum(count for count, _ in ALLOWED.values()) <= 10


def test_each_sort_of_test_is_seen() -> None:
    """The check itself: what it must find, and what it must not."""
    for line in (
        'if kind == "lokr": pass',
        'if patch.kind in ("lora", "loha"): pass',
        'if config["peft_type"] == "OFT": pass',
        'if target.name == "peft": pass',
        'if program.name in ("kohya", "lycoris"): pass',
        "if isinstance(delta, LowRank): pass",
        "if isinstance(delta, (pk.delta.Kron, Hadamard)): pass",
        "if isinstance(adapter, OFT): pass",
        "if isinstance(form, Additive): pass",
    ):
        assert list(violations(line, "files")) == [1], line
    for line in ('Patch("lora", {})', 'if path.suffix == ".pt": pass', "if isinstance(x, Tensor): pass"):
        assert list(violations(line, "files")) == [], line
