"""Under torchrun two processes train, save, export and merge divided layers as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_two_processes_write_what_one_does(kind: str, tmp_path: Path) -> None:
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    for name, launcher in launchers.items():
        (tmp_path / name).mkdir()
        command = [*launcher, "-m", "tests.support.torchrun", kind, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for file in ("merged.safetensors", "own.safetensors", "peft/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in launchers)
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.allclose(two[key], value, atol=1e-5), f"{file}: {key}"
    losses = load_file(tmp_path / "two" / "merged.safetensors")["losses"]
    assert losses[2] < losses[0]
