"""`make gpu`: without a GPU every part runs to its end and writes nothing, and what fails or takes too long is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from peftkit.bench import rows
from peftkit.bench.peers import KINDS
from peftkit.bench.rows import Row
from peftkit.bench.runner import Cell
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which `make gpu` measures"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.slow
def test_it_runs_to_its_end_and_says_what_is_left_out(tmp_path: Path) -> None:
    """All parts but the tests, which are part of this suite; a file only where one is asked for."""
    out, results = tmp_path / "out.json", ROOT / "benchmarks" / "results"
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    done = run("--parts", "operators,step,merge,network,repeats", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == before
    assert "PyTorch finds no GPU" in done.stdout
    assert "the kernels and torch.compile" in " ".join(done.stdout.split())
    found = rows.read(out)
    for part in ("operators", "step", "merge", "network", "repeats"):
        count = len(list(gpu.PARTS[part].cells()))
        assert f" {count} of {count} " in next(
            line for line in done.stdout.splitlines()[::-1] if line.startswith(f"  {part} ")
        )
    assert {row.question for row in found} == {"operators", "step", "merge", "network step", "repeats"}


def test_the_parts_fit_into_ten_minutes() -> None:
    assert sum(part.limit for part in gpu.PARTS.values()) <= 600


def test_what_a_gpu_will_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are read and models are listed before a GPU is there: what is wrong with them shows here."""
    monkeypatch.setattr(gpu, "GPU", True)
    monkeypatch.setattr(gpu, "TRIED", tuple(KINDS))
    counts = {name: len(list(part.cells())) for name, part in gpu.PARTS.items()}
    assert counts == {"tests": 1, "operators": 24, "step": 72, "merge": 6, "network": 24, "repeats": 12}


def test_a_part_is_cut_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.PARTS, "repeats", replace(gpu.PARTS["repeats"], limit=0.1))
    outcome = gpu.run_part("repeats")
    assert outcome.cut
    assert outcome.seconds < 30
    assert outcome.failed == [f"nothing was done in {outcome.seconds:.0f} s"]


def test_a_measurement_that_ends_its_process_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part goes on behind it: here one more measurement is expected than the process makes."""
    cells = gpu.PARTS["operators"].cells

    def one_more() -> Iterator[Cell]:
        yield from cells()
        yield lambda: Row("operators", "missing", "missing")

    monkeypatch.setitem(gpu.PARTS, "operators", replace(gpu.PARTS["operators"], cells=one_more))
    outcome = gpu.run_part("operators")
    assert len(outcome.rows) == outcome.cells == len(list(cells())) + 1
    assert not outcome.cut
    (failed,) = outcome.failed
    assert failed.startswith(f"operators measurement {outcome.cells}: ")


def test_other_bits_and_failed_tests_are_failures() -> None:
    found = [
        Row("repeats", "lora", "64×64, 8 tokens", "float32", values={"step": True, "merge": False}),
        Row("tests", "kernels", "file", values={"passed": 3, "failed": ["test_x: wrong"]}),
    ]
    assert gpu.Outcome(found, 2, 1.0).failed == [
        "lora in float32: other bits the second time: merge",
        "tests kernels file: test_x: wrong",
    ]


def test_an_unknown_part() -> None:
    done = run("--parts", "operatrs")
    assert done.returncode == 2
    assert "one or more of tests, operators" in done.stderr
