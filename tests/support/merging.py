"""Layouts and dtypes for the tests of merging file to file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peftkit.files.families.names import Family
from tests.support.files import State, write
from tests.support.hands import full, lora, lycoris_tensors
from tests.support.models import state
from tests.support.small_families import diffusers_state, original_state

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


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
    return base, write(folder / "a.safetensors", lycoris_tensors(hands))
