"""The package as a user meets it: what it imports, what it costs, and that its own documents run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout


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


def test_the_readme_runs(tmp_path: Path) -> None:
    """Every python block, in order, in one process."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    command = [sys.executable, "-W", "error", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "pattern, where, allowed",
    [
        (r"isinstance\([^)]*nn\.(Conv|Linear)", "peftkit", {"geometry.py", "sites.py"}),
        (r"except Exception|except:", "peftkit", set()),
        (r"^\s*print\(", "peftkit", set()),
        # but for the two callbacks, which are modules of their own that nothing imports
        (
            r"^\s*(import|from) (transformers|diffusers|peft|lycoris|lightning)\b",
            "peftkit",
            {"trainer.py", "lightning.py"},
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
