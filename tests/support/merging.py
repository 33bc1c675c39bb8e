"""Layouts and dtypes for the tests of merging file to file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkit.files.families.names import Family
from tests.support.checkpoints import Hand, State, diffusers_state, full, lora, original_state, state, write

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def close(ours: Tensor, theirs: Tensor, bound: float, what: str = "") -> None:
    """‖ours − theirs‖ ≤ bound·‖theirs‖."""
    error, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
    assert error <= bound * size, f"{what}: relative error {error / size:.2e} above {bound:.0e}"


def lycoris(hands: Mapping[str, Hand]) -> State:
    """A file of LyCORIS' generic wrapper."""
    return {
        key: t for name, hand in hands.items() for key, t in hand.keyed(f"lycoris_{name.replace('.', '_')}").items()
    }


def sharded(folder: Path, tensors: State, cut: int) -> Path:
    """Two shards with an index, as transformers writes them."""
    keys = list(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = {files[0]: keys[:cut], files[1]: keys[cut:]}
    for file, own in parts.items():
        write(folder / file, {key: tensors[key] for key in own}, {"format": "pt"})
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {key: file for file, own in parts.items() for key in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


#: by family: the split projections with the fused layer of the published file; and modules whose halves are swapped
FUSED: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "sd35-medium": [
        (
            "joint_blocks.1.x_block.attn.qkv",
            "transformer_blocks.1.attn.",
            ("to_q", "to_k", "to_v"),
        ),
        (
            "joint_blocks.0.context_block.attn.qkv",
            "transformer_blocks.0.attn.",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
        ),
        ("joint_blocks.0.x_block.attn2.qkv", "transformer_blocks.0.attn2.", ("to_q", "to_k", "to_v")),
    ],
    "flux": [
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.", ("to_q", "to_k", "to_v")),
        (
            "single_blocks.0.linear1",
            "single_transformer_blocks.0.",
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ),
    ],
}


def both_layouts(family: Family, tmp_path: Path) -> tuple[State, Path, Path]:
    """The transformer's weights, and the two checkpoints of them."""
    theirs = diffusers_state(family, component="transformer")
    split = write(tmp_path / "split.safetensors", theirs)
    fused = write(
        tmp_path / "fused.safetensors", original_state(family, {f"transformer.{k}": t for k, t in theirs.items()})
    )
    return theirs, split, fused


def other(model: nn.Module, by: float) -> State:
    """Another base: every weight moved by that share of itself."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: t if not t.is_floating_point() else t * (1 + by * torch.randn(t.shape, generator=generator))
        for key, t in state(model).items()
    }


def prepared(folder: Path) -> tuple[Path, Path]:
    """A base of several tensors and an adapter of two of them."""
    tensors = {f"layer{i}.weight": torch.randn(64, 64) for i in range(6)} | {"big.weight": torch.randn(700, 700)}
    base = write(folder / "base.safetensors", tensors)
    hands = {"layer1": full(64, 64, seed=1), "layer4": lora(64, 64, seed=2)}
    return base, write(folder / "a.safetensors", lycoris(hands))


def run_python(script: str, *arguments: object) -> Any:
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
