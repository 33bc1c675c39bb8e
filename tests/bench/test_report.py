"""Tables of results: whole words in 80 columns, and one schema for all files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from peftkit.bench import report, rows
from peftkit.bench.cases import MODELS
from peftkit.bench.rows import Row
from peftkit.bench.timing import Spread
from peftkit.cli.bench import app
from tests.support.paths import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def shown(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue()


def whole_words(text: str, expected: set[str]) -> None:
    """No line is longer than 80 columns, nothing was cut, and every word that was to be shown is there whole."""
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert expected <= set(text.split())


@pytest.mark.parametrize("question", ["step", "checkpoint"])
def test_comparisons_fit_80_columns(question: str) -> None:
    ways = dict.fromkeys(("ours", "lycoris", "lycoris bypass", "peft"), Spread(123.456, 99.5, 1024.25))
    cases = [str(layer) for name in MODELS if name != "sd15-unet" for layer in MODELS[name]()]
    cases += ["sd15-unet: 282 layers, 859M", "SD 1.5 U-Net, 282 layers, latents of 32²"]
    found = [
        Row(question, "loldu", case, "bfloat16", "touching every weight", 12345.6, ways, dict.fromkeys(ways, 1e4), 1e-7)
        for case in cases
    ]
    words = {word for row in found for word in f"{row.kind} {row.case} bf16 lycoris bypass 123.46 1e-07".split()}
    whole_words(shown(report.table(found, question)), words)
    (compared,) = report.compared(found, found)
    whole_words(shown(compared), (words | {"123", "(99.5–1024)", "~"}) - {"lycoris", "bypass", "123.46", "1e-07"})


def test_the_command_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["step", "--shapes", "64x64@4,32x32k3@6", "--rounds", "1", "--kinds", "lora", "--dtype", "fp32,bf16"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    whole_words(done.output, {"kind", "layer", "dtype", "way", "ratio", "ms", "MB", "error", "fp32", "bf16", "ours"})


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_file_of_results_has_the_one_schema(path: Path) -> None:
    found = json.loads(path.read_text())
    assert {"format", "benchmark", "command", "device", "rows"} <= set(found)
    assert found["format"] == 2
    read = rows.read(path)
    assert read
    assert all(row.ratio or row.values for row in read)
    again = json.loads(rows.dump(read, benchmark=found["benchmark"], device="cpu", command=found["command"]))
    assert again["rows"] == found["rows"]
    compared = [row for row in read if row.ratio]
    if compared:
        text = shown(report.table(compared))
        whole_words(text, {word for row in compared for word in re.split(r"\s", row.case)})
