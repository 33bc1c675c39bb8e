"""The package as a user meets it: what it imports, what it costs, and what its code must not hold."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

import peftkit as pk
from tests.support.paths import ROOT


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.processes
def test_import_is_light() -> None:
    """At most 150 ms beyond torch, the best of three, and nothing that only extras need."""
    code = (
        "import torch, time; t = time.process_time(); import peftkit; d = time.process_time() - t\n"
        "import sys; heavy = {'triton', 'matplotlib', 'transformers', 'diffusers', 'peft', 'lycoris', 'sklearn'}\n"
        "print(d, *heavy & set(sys.modules))"
    )
    lines = [python(code).split() for _ in range(3)]
    assert all(line[1:] == [] for line in lines)
    assert min(float(line[0]) for line in lines) <= 0.150


def test_dir_shows_public_names_only() -> None:
    """Those of the API pages, with the modules among them; what the package itself is made of is not listed."""
    assert dir(pk) == sorted(pk.__all__)
    assert len(pk.__all__) == len(set(pk.__all__))
    assert not {"annotations", "Any", "TYPE_CHECKING", "import_module", "geometry", "wrapping", "files"} & set(dir(pk))
    modules = {name for name in dir(pk) if inspect.ismodule(getattr(pk, name))}
    assert modules == {"adapters", "delta", "errors", "kernels", "monitor", "testing", "training"}
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: peftkit\.(\w+)$", pages, re.MULTILINE)) - modules
    assert documented == set(dir(pk)) - modules - {"__version__"}
    scope: dict[str, object] = {}
    exec("from peftkit import *", scope)
    assert scope.keys() >= set(dir(pk))


@pytest.mark.parametrize(
    "pattern, where, allowed",
    [
        (r"isinstance\([^)]*nn\.(Conv|Linear)", "peftkit", {"layer.py", "sites.py"}),
        (r"except Exception|except:", "peftkit", set()),
        (r"^\s*print\(", "peftkit", set()),
        # but for callbacks and integrations, which are modules of their own that nothing imports
        (
            r"^\s*(import|from) (transformers|diffusers|peft|lycoris|lightning)\b",
            "peftkit",
            {"trainer.py", "lightning.py", "transformers.py"},
        ),
        (r"TODO|FIXME|XXX", "peftkit", set()),
    ],
)
def test_what_must_not_exist(pattern: str, where: str, allowed: set[str]) -> None:
    found = [
        f"{path.name}:{number}"
        for path in (ROOT / where).rglob("*.py")
        if path.name not in allowed
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found


def test_files_are_named_for_what_they_hold() -> None:
    names = {path.stem for path in (ROOT / "peftkit").rglob("*.py")}
    assert not names & {"util", "utils", "common", "helpers", "helper", "misc"}
