"""Fixed seeds, and uninitialised memory that shows: torch.empty is NaN when the library asks for it.

Where other libraries are not installed, as on the oldest dependencies, the tests that import them are left out.
"""

import ast
import random
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

_ROOT = Path(__file__).resolve().parents[1]


def _imports(path: Path) -> Iterator[str]:
    """The modules that a file imports when it is imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def _missing(path: Path) -> frozenset[str]:
    """The libraries that are not installed, of those that a file and what it takes from tests.support import."""
    found: set[str] = set()
    for name in _imports(path):
        own = _ROOT.joinpath(*name.split("."))
        if name.startswith("tests."):
            files = [each for each in (own.with_suffix(".py"), own / "__init__.py") if each.is_file()]
            found |= frozenset().union(*map(_missing, files))
        elif find_spec(name.partition(".")[0]) is None:
            found.add(name.partition(".")[0])
    return frozenset(found)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.name.startswith("test_") and _missing(collection_path) else None


def pytest_report_header() -> list[str]:
    gone = sorted(frozenset().union(*map(_missing, _ROOT.glob("tests/**/test_*.py"))))
    return [f"not installed, and the tests that import them left out: {', '.join(gone)}"] if gone else []


_empty, _empty_like = torch.empty, torch.empty_like

# torch lists the functions that `with torch.device(…)` acts on at its first use: these, and not those that poison
with torch.device("meta"):
    torch.empty(0)


def _poisoned(original: Any) -> Any:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("peftkit") and tensor.is_floating_point() and not tensor.is_meta:
            tensor.fill_(float("nan"))
        return tensor

    return empty


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    monkeypatch.setattr(torch, "empty", _poisoned(_empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(_empty_like))
