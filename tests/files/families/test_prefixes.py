"""Prefixes that few programs write, and parts of layers that have names of their own, in a family that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftkit as pk
from peftkit.files.families.names import FAMILIES, Family
from peftkit.files.families.prefixes import SPELLED, usual
from tests.support.files import load, write
from tests.support.merging import both_layouts
from tests.support.small_families import use_small_families

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = PATH.replace(".", "_")


@pytest.mark.parametrize(
    "name",
    [
        f"lora_unet__{FLAT}",
        f"lora_unet_{PATH.replace('.', '_', 2)}",
        f"unet.base_model.model.{PATH}",
        f"unet._orig_mod.{PATH}",
        f"base_model.model._orig_mod.{PATH}",
    ],
)
def test_a_file_of_a_rare_prefix_is_of_its_family_and_is_exported(name: str, tmp_path: Path) -> None:
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 320), f"{name}.lora_B.weight": torch.ones(320, 1)}
    path = write(tmp_path / "a.safetensors", tensors)
    scale: dict[str, Any] = {"alpha": "rank"} if "base_model" in name else {}
    assert FAMILIES["sd15"].find(name) == FAMILIES["sd15"].find(f"unet.{PATH}")
    assert pk.inspect(path, **scale).family == "Stable Diffusion 1.5"
    pk.export(path, tmp_path / "kohya.safetensors", "kohya", **scale)
    assert list(pk.read(tmp_path / "kohya.safetensors").patches) == [f"lora_unet_{FLAT}"]
    plain = write(tmp_path / "plain.safetensors", {f"unet.{PATH}{k.removeprefix(name)}": t for k, t in tensors.items()})
    pk.convert(path, tmp_path / "full.safetensors", "full", **scale)
    assert pk.diff(tmp_path / "full.safetensors", plain).equal


def test_what_is_usual_is_so_already() -> None:
    for spelled in SPELLED:
        assert usual(usual(f"{spelled}blocks.0.q")) == usual(f"{spelled}blocks.0.q")


def test_the_attention_s_rows_of_a_single_block_go_where_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ComfyUI's name for the first three parts of linear1, and XLabs' for those of double blocks."""
    family: Family = use_small_families(monkeypatch)["flux"]
    _, split, fused = both_layouts(family, tmp_path)
    names = ("lora_unet_single_blocks_0_linear1_qkv", "double_blocks.0.processor.qkv_lora2")
    ends = {"lora_down": (1, 4), "lora_up": (9216, 1)}, {"down": (1, 4), "up": (9216, 1)}
    tensors = {f"{n}.{e}.weight": torch.ones(s) for n, end in zip(names, ends, strict=True) for e, s in end.items()}
    path = write(tmp_path / "a.safetensors", tensors)
    before = load(fused)
    pk.merge_checkpoint(fused, {path: 1.0}, tmp_path / "out.safetensors")
    merged = load(tmp_path / "out.safetensors")
    keys = [key for key in merged if not torch.equal(merged[key], before[key])]
    changed = {key.removeprefix("model.diffusion_model."): merged[key] - before[key] for key in keys}
    assert set(changed) == {"single_blocks.0.linear1.weight", "double_blocks.0.txt_attn.qkv.weight"}
    rows = changed["single_blocks.0.linear1.weight"]
    assert bool((rows[:9216].round() == 1).all()) and not bool(rows[9216:].any())
    plan = pk.plan_merge(split, {path: 1.0})
    attention = {f"single_transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"}
    context = {f"transformer_blocks.0.attn.add_{part}_proj.weight" for part in "qkv"}
    assert set(plan.touched) == attention | context
