"""The source archive and the wheel, built and installed as a user's pip does it; offline, in folders of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import peftkit as pk
from tests.support.paths import ROOT

#: what is made here and is in no repository
_MADE = shutil.ignore_patterns(
    ".git", ".venv*", "*.egg-info", "__pycache__", ".*_cache", "build", "dist", "site", "out"
)


def call(*command: object, cwd: Path) -> str:
    """What a command prints. It sees the packages of its interpreter and the folder, and no other peftkit."""
    environment = {**os.environ, "PYTHONPATH": "", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(what: str, source: Path, folder: Path) -> Path:
    """Build with the backend of pyproject.toml, by the same call that pip makes; returns the file."""
    folder.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print('built', build_meta.build_{what}({str(folder)!r}))"
    name = call(sys.executable, "-I", "-c", code, cwd=source).rsplit("built ", 1)[1].strip()
    return folder / name


# of a group: one worker builds the package, and not each for itself
pytestmark = pytest.mark.xdist_group("package")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of a copy of the repository."""
    source = tmp_path_factory.mktemp("copy") / "peftkit"
    shutil.copytree(ROOT, source, ignore=_MADE)
    return built("sdist", source, source.parent / "dist")


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in the archive."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)
    return folder / f"peftkit-{pk.__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    """The wheel, built from the archive alone."""
    return built("wheel", unpacked, unpacked.parent / "dist")


def modules(names: Sequence[str]) -> set[str]:
    return {name for name in names if name.startswith("peftkit/") and name.endswith(".py")}


OWN = {str(path.relative_to(ROOT)) for path in (ROOT / "peftkit").rglob("*.py")}


def test_the_archive_has_what_its_tests_need(unpacked: Path) -> None:
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert modules([*names]) == OWN
    for folder in ("tests", "examples", "docs", "scripts", "benchmarks"):
        kept = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert kept <= names
    assert names >= {"Makefile", "constraints.txt", "mkdocs.yml", ".importlinter", "README.md", "LICENSE"}
    assert names >= {"peftkit/py.typed", "tests/conftest.py", "tests/support/laws.py", "tests/support/zoo.py"}
    assert [name for name in names if name.endswith(".pyc")] == []
    ran = call(sys.executable, "-m", "pytest", "-x", "tests/delta/test_as_low_rank.py", cwd=unpacked)
    assert re.search(r"^[1-9]\d* passed", ran, re.MULTILINE)


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {*opened.namelist()}
        metadata = opened.read(f"peftkit-{pk.__version__}.dist-info/METADATA").decode()
    assert modules([*names]) == OWN
    assert names >= {"peftkit/py.typed", "peftkit/wrapping/presets/full.toml"}
    assert {name.split("/")[0] for name in names} == {"peftkit", f"peftkit-{pk.__version__}.dist-info"}
    assert f"Version: {pk.__version__}" in metadata
    assert "Author: peftkit contributors" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_five_minutes_of_the_readme_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    call(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python),
        *("install", "--no-deps", "--no-index", wheel),
        cwd=tmp_path,
    )
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # The dependencies come from here, behind the wheel: a .pth file of that folder, an editable install, is not read
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    where = call(python, "-I", "-c", "import peftkit; print(peftkit.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(site)
    block = re.search(r"^## Five minutes\n\n```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert block is not None
    (tmp_path / "five_minutes.py").write_text(block[1])
    printed = call(python, "-I", "-W", "error", "five_minutes.py", cwd=tmp_path)
    assert "adapters ran and got a gradient" in printed
    assert (tmp_path / "style.safetensors").is_file()
    assert f"{pk.__version__}" in call(tmp_path / "venv" / "bin" / "peftkit", "--version", cwd=tmp_path)
