"""What the tests of commands share: the command without a process, and a folder of files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.cli import run
from tests.support.command import HANDS, ODD, Ran
from tests.support.files import write
from tests.support.hands import exact, full, lycoris_tensors
from tests.support.models import net, state


@pytest.fixture
def peftkit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The same without a process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["peftkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, what it was tuned to, an adapter of three of its weights under an odd name, and another."""
    before = state(net())
    write(tmp_path / "base.safetensors", before)
    write(tmp_path / "tuned.safetensors", {**before, "lin.weight": before["lin.weight"] + exact(12, 8, seed=3)})
    write(tmp_path / ODD, lycoris_tensors(HANDS))
    write(tmp_path / "other.safetensors", lycoris_tensors({"lin": full(12, 8, seed=4)}))
    return tmp_path
