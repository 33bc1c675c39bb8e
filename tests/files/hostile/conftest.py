"""A folder for hostile files, and what is built once on first use."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.support.corpus import ADAPTER_VERBS, BASE_VERBS, Place, outcome


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """What is built once, on first use, is no file's doing."""
    with tempfile.TemporaryDirectory() as folder:
        at = Place(Path(folder)).prepare()
        for verb in (*ADAPTER_VERBS.values(), *BASE_VERBS.values()):
            outcome(verb, at.good, at)


@pytest.fixture
def at(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def pickling(tmp_path: Path) -> Place:
    return Place(tmp_path, allow_pickle=True)
