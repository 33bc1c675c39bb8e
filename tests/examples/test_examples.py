"""The examples run as they stand, and do what their first line says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peftkit.monitor import read_run
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run an example in an empty folder; its variables."""
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_wrap_and_train(run: Any, tmp_path: Path) -> None:
    found = run("wrap_and_train")
    assert found["error"] < found["y"].var().item() / 2
    assert found["error"] == pytest.approx(found["loss"].item(), rel=0.05)  # of the last step but one, before merging
    assert [type(module) for module in found["model"]] == [nn.Linear, nn.GELU, nn.Linear]
    assert (tmp_path / "product.safetensors").is_file()


def test_merge_into_checkpoint(run: Any, tmp_path: Path) -> None:
    found = run("merge_into_checkpoint")
    before, after = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "merged.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.weight", "2.weight"}
    gap = sum((after[name] - before[name]).square().sum() for name in changed).sqrt().item()
    assert gap == pytest.approx(found["report"].norm, rel=1e-4)


def test_export_for_a_program(run: Any, tmp_path: Path) -> None:
    found = run("export_for_a_program")
    assert (tmp_path / "style_peft" / "adapter_config.json").is_file()
    assert [weight.how for weight in found["report"].weights] == ["exact", "exact"]
    assert found["gap"].equal
    assert set(found["gap"].distances) == {"to_q", "to_k"}


def test_watch_a_run(run: Any, tmp_path: Path) -> None:
    found = run("watch_a_run")
    assert found["stopper"].advice.step is not None
    assert len([row for row in read_run(tmp_path / "run.jsonl").rows if row.noted]) == 20
    assert (tmp_path / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py") if path.stem != "text_minilm"))
def test_an_example_is_short(name: str) -> None:
    code = (EXAMPLES / name).read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
