"""Whole networks: what is measured on them is a step of every layer, and peers adapt the same layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftkit.bench import model_step, rows
from peftkit.bench.networks import Network, decoder, unet
from peftkit.wrapping.installed import adapted_modules
from tests.support.paths import ROOT


def small(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return decoder(layers=2, width=64, heads=2, tokens=6, batch=2, dtype=dtype)


def test_the_decoder_is_causal_and_knows_positions() -> None:
    network = small()
    x, cos, sin = network.inputs
    with torch.no_grad():
        out = network()
        assert out.shape == (2, 6, 64)
        changed = x.clone()
        changed[:, 3] += 1
        later = network.body(changed, cos, sin)
        moved = network.body(x.roll(1, 1), cos, sin)
    assert torch.equal(out[:, :3], later[:, :3])
    assert not torch.allclose(out[:, 3:], later[:, 3:])
    assert not torch.allclose(out.roll(1, 1)[:, 2:], moved[:, 2:])


def test_a_twin_shares_weights_and_input_and_takes_its_own_adapters() -> None:
    network = small()
    twin = model_step.adapted("ours", "lora", network.twin())
    assert {id(p) for p in network.parameters()} <= {id(p) for p in twin.parameters()}
    assert twin.inputs[0] is network.inputs[0]
    assert len(adapted_modules(twin)) == 14
    assert not adapted_modules(network)
    gradients = model_step.step(twin)()
    assert isinstance(gradients, tuple)
    assert len(gradients) == 1 + 2 * 14
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_step_is_measured_beside_peers() -> None:
    row = model_step.measure(small(), "lora", case="small", peers=["lycoris", "peft"], rounds=1)
    assert set(row.ratio) == {"ours", "lycoris", "lycoris bypass", "peft"}
    assert set(row.memory) == {"frozen", *row.ratio}
    assert row.memory["frozen"] < row.memory["ours"] < row.memory["lycoris"]


def test_a_small_unet_of_the_same_kind() -> None:
    row = model_step.measure(unet("tiny", 8), "lora", case="tiny", peers=[], rounds=1)
    assert row.ratio["ours"].median > 0


@pytest.mark.processes
def test_the_transformer_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ["--layers", "1", "--width", "64", "--tokens", "8", "--rounds", "1", "--kinds", "lora,oft"]
    command = [sys.executable, "benchmarks/transformer.py", *sizes, "--json", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    found = rows.read(out)
    assert [(row.kind, row.dtype) for row in found] == [
        (kind, dtype) for dtype in ("float32", "bfloat16") for kind in ("lora", "oft")
    ]
