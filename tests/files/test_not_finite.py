"""A ΔW that overflows, has no singular values or does not fit into memory is refused by file and module."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, PeftkitError

#: finite factors whose product no float32 holds
OVERFLOWING: dict[str, dict[str, Tensor]] = {
    "lora": {"up": torch.full((12, 2), 1e30), "down": torch.full((2, 8), 1e30)},
    "lora of full rank": {"up": torch.full((12, 8), 1e30), "down": torch.full((8, 8), 1e30)},
    "loha": {name: torch.full(size, 1e20) for name, size in (("w1_a", (12, 2)), ("w1_b", (2, 8)))}
    | {name: torch.full(size, 1e20) for name, size in (("w2_a", (12, 2)), ("w2_b", (2, 8)))},
    "lokr": {"w1": torch.full((2, 2), 1e25), "w2": torch.full((6, 4), 1e25)},
}
#: what needs no more than the factors, so that nothing overflows
BY_FACTORS = {("lora", verb) for verb in ("resize", "resize by energy", "convert to lora", "convert to loha")} | {
    ("lora", "combine by svd"),
    ("lokr", "convert to lokr"),
}
PREFIX = {"lora": "lora_{}.weight", "loha": "hada_{}", "lokr": "lokr_{}"}

VERBS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "resize": lambda path, good, out: pk.resize(path, out, rank=1),
    "resize by energy": lambda path, good, out: pk.resize(path, out, energy=0.9),
    "convert to lora": lambda path, good, out: pk.convert(path, out, "lora", rank=1),
    "convert to loha": lambda path, good, out: pk.convert(path, out, "loha", threshold=0.1),
    "convert to lokr": lambda path, good, out: pk.convert(path, out, "lokr", factor=4),
    "convert to full": lambda path, good, out: pk.convert(path, out, "full"),
    "combine by svd": lambda path, good, out: pk.combine({good: 1, path: 1}, out, method="svd", rank=1),
    "combine by ties": lambda path, good, out: pk.combine({good: 1, path: 1}, out, method="ties", rank=1),
    "combine by dare": lambda path, good, out: pk.combine({good: 1, path: 1}, out, method="dare"),
}


def write(path: Path, case: str) -> Path:
    spelling = PREFIX[case.partition(" ")[0]]
    tensors = {f"layer.{spelling.format(name)}": tensor for name, tensor in OVERFLOWING[case].items()}
    save_file(tensors, path)
    return path


def good(path: Path) -> Path:
    torch.manual_seed(0)
    save_file({"layer.lora_up.weight": torch.randn(12, 2), "layer.lora_down.weight": torch.randn(2, 8)}, path)
    return path


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", OVERFLOWING)
def test_a_change_that_overflows_is_converted_or_refused_by_file_and_module(
    case: str, verb: str, tmp_path: Path
) -> None:
    path, out = write(tmp_path / "overflowing.safetensors", case), tmp_path / "out.safetensors"
    if (case, verb) in BY_FACTORS:
        VERBS[verb](path, good(tmp_path / "good.safetensors"), out)
        assert pk.doctor(out).code == 0
        return
    with pytest.raises(PeftkitError, match=r"overflowing.safetensors.*layer"):
        VERBS[verb](path, good(tmp_path / "good.safetensors"), out)
    assert not out.exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("verb", VERBS)
def test_a_number_that_is_not_finite_is_refused_by_file_and_module(verb: str, number: float, tmp_path: Path) -> None:
    path, out = tmp_path / "broken.safetensors", tmp_path / "out.safetensors"
    up = torch.ones(12, 2)
    up[3, 1] = number
    save_file({"layer.lora_up.weight": up, "layer.lora_down.weight": torch.ones(2, 8)}, path)
    with pytest.raises(PeftkitError, match=r"broken.safetensors: layer: non-finite: up"):
        VERBS[verb](path, good(tmp_path / "good.safetensors"), out)
    assert not out.exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_named_with_the_module(number: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    pk.wrap(model, "ia3")
    with torch.no_grad():
        next(iter(pk.adapter_parameters(model))).add_(0.5)
    path = pk.save(model, tmp_path / "gains.safetensors")
    weight = torch.ones(12, 8)
    weight[2, 2] = number
    save_file({"0.weight": weight}, tmp_path / "base.safetensors")
    with pytest.raises(FileError, match=r"gains.safetensors: 0: its ΔW of 12×8 is not finite"):
        pk.resize(path, tmp_path / "out.safetensors", rank=1, base=tmp_path / "base.safetensors", other_base=True)


def test_a_difference_without_singular_values_is_refused_by_file_and_module(tmp_path: Path) -> None:
    """Each entry is finite, and no sum of their squares is."""
    for name, value in (("base", 0.0), ("tuned", 3e38)):
        save_file({"layer.weight": torch.full((12, 8), value)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(PeftkitError, match=r"tuned.safetensors(?s:.*)layer"):
        pk.extract(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", tmp_path / "out.safetensors", rank=1)
    assert not (tmp_path / "out.safetensors").exists()


_CONVERT = """
import resource, sys
import peftkit as pk
from peftkit.errors import ExportError
pk.convert
room = 4 << 30
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
try:
    pk.convert(sys.argv[1], sys.argv[2], sys.argv[3])
except ExportError as error:
    print(error)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="the room of a process is limited through /proc")
@pytest.mark.parametrize("kind", ["full", "lokr"])
def test_a_change_that_memory_does_not_hold_is_refused_by_file_and_module(kind: str, tmp_path: Path) -> None:
    path, out = tmp_path / "wide.safetensors", tmp_path / "out.safetensors"
    save_file({"layer.lora_up.weight": torch.ones(60_000, 1), "layer.lora_down.weight": torch.ones(1, 60_000)}, path)
    run = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(path), str(out), kind], capture_output=True, text=True, check=False
    )
    assert "wide.safetensors: layer: its ΔW does not fit into memory" in run.stdout, run.stderr[-2000:]
    assert not out.exists()
