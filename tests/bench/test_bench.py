"""peftkit bench: what it measures is right, it refuses what is not, and its files can be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from peftkit.bench import ops, report, rows, step
from peftkit.bench.cases import MODELS, LayerShape
from peftkit.bench.peers import KINDS
from peftkit.bench.rows import Row
from peftkit.bench.timing import Spread, contest, peak_bytes, ratios
from peftkit.cli.bench import app
from peftkit.errors import BenchError, FileError, OptionError
from peftkit.kernels import fused

SMALL = LayerShape(64, 64, tokens=8)


def bench(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_contest_takes_turns_and_prepares() -> None:
    calls: list[str] = []
    seconds = contest(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3,
        least=0,
        prepare={"b": lambda: calls.append("prepared")},
    )
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert calls.count("b") == calls.count("prepared") == 3
    assert all(calls[i - 1] == "prepared" for i, call in enumerate(calls) if call == "b")
    found = ratios({"x": [2.0, 4.0, 9.0]}, [1.0, 2.0, 3.0])["x"]
    assert (found.median, found.p10, found.p90) == pytest.approx((2.0, 2.0, 2.8))


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    def call() -> Tensor:
        one = torch.zeros(1000)
        two = torch.zeros(1000)
        del one
        return torch.zeros(1000) + two

    assert 8000 <= peak_bytes(call, "cpu") <= 13000


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_step_is_small_and_seen(kind: str) -> None:
    row = step.measure(SMALL, kind, torch.float32, peers=[], rounds=1)
    assert row.error is not None
    assert 0 < row.error < 1e-5
    assert row.ratio["ours"].median > 0


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fused.add_pointwise_
    monkeypatch.setattr(fused, "add_pointwise_", lambda out, h, B, s: original(out, 1.01 * h, B, s))
    with pytest.raises(BenchError, match="nothing was timed"):
        step.measure(SMALL, "lora", torch.float32, peers=[], rounds=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora", "oft"])
def test_the_peers_do_the_same_work(kind: str) -> None:
    """As many trained parameters, and each operation that is compared has a peer."""
    from peftkit.bench.peers import adapted, ways

    layer = SMALL.layer()
    models = {way: adapted(way, kind, layer) for way in ways(["lycoris", "peft"], kind)}
    counts = {way: sum(p.numel() for p in m.parameters() if p.requires_grad) for way, m in models.items()}
    if kind == "oft":  # lycoris trains whole blocks, of which only the antisymmetric part counts
        counts = {way: count for way, count in counts.items() if not way.startswith("lycoris")}
    assert len(set(counts.values())) == 1, counts
    row = ops.measure("add", SMALL, kind, torch.float32, peers=["lycoris", "peft"], rounds=1)
    assert set(row.ratio) == {"ours", "lycoris", "peft"}


@pytest.mark.parametrize(
    "command", ["step", pytest.param("ops", marks=pytest.mark.slow), "merge", "monitor", "checkpoint"]
)
def test_every_question_writes_rows_that_read_back(command: str, tmp_path: Path) -> None:
    out = tmp_path / "found" / "out.json"
    layers = "32x32k3@6" if command == "ops" else "64x64@4,32x32k3@6"
    said = bench(command, "--shapes", layers, "--rounds", "2", "--kinds", "lora,oft", "--json", str(out))
    assert "lora" in said
    assert "oft" in said
    found = rows.read(out)
    expected = {"step": 4, "ops": 8, "merge": 2, "monitor": 2, "checkpoint": 2}[command]
    assert len(found) == expected
    assert all(row.ratio["ours"].median > 0 and row.reference_ms > 0 for row in found)
    written = json.loads(out.read_text())
    assert written["benchmark"] == command
    assert written["versions"]["torch"] == torch.__version__
    assert (written["device"], written["threads"]) == ("cpu", 1)
    assert written["processor"]
    compared = bench("compare", str(out), str(out))
    assert "1.00" in compared


def test_a_picture(tmp_path: Path) -> None:
    bench("step", "--shapes", "64x64@4", "--rounds", "1", "--kinds", "lora", "--plot", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--shapes", "64by64"], "is no layer"),
        (["--shapes", "0x64@4"], "is no layer"),
        (["--kinds", "lorra"], "lora, loha"),
        (["--peers", "axolotl"], "lycoris, peft"),
        (["--dtype", "fp8"], "fp32, fp16"),
        (["--device", "tpu"], "'cpu' or 'cuda'"),
    ],
)
def test_bad_options(arguments: list[str], expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        bench("step", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BenchError, match="finds no GPU"):
        bench("step", "--device", "cuda")


@pytest.mark.parametrize("text", ["", "{}", '{"format": 0}', '{"format": 1, "rows": [{}]}'])
def test_files_that_are_not_of_bench(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(FileError):
        rows.read(file)


def test_files_without_a_cell_in_common() -> None:
    def row(kind: str) -> Row:
        return Row("step", kind, "a", "float32", "frozen layer", 1.0, {"ours": Spread(1.0, 1.0, 1.0)})

    with pytest.raises(FileError, match="no cell in common"):
        report.compared([row("lora")], [row("oft")])


def test_the_layers_of_models() -> None:
    unet = MODELS["sd15-unet"]()
    assert len(unet) == 282
    assert 855e6 < sum(layer.outputs * layer.columns for layer in unet) < 865e6
    made: dict[str, Any] = {name: layers() for name, layers in MODELS.items() if name != "sd15-unet"}
    assert all(len(set(layers)) == len(layers) > 0 for layers in made.values())
    conv = LayerShape.parse("320x4k3@64")
    assert conv.layer()(conv.input()).shape == (1, 320, 64, 64)
    assert (conv.columns, conv.positions, str(conv)) == (36, 4096, "conv 320×4 k3, 64²")
