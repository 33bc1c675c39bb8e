"""What `inspect` says a program loads is what the program's reader makes of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import peftkit as pk
from peftkit.files.families.names import FAMILIES
from tests.support.files import write
from tests.support.readers import READERS, Refused

#: modules of every network of a family that adapters are usually of
_UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0."
_CLIP = [f"text_encoder.text_model.encoder.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
MODULES = {
    "sd15": [f"{_UNET}attn1.to_q", f"{_UNET}attn2.to_k", *_CLIP],
    "sdxl": [f"{_UNET}attn1.to_q", f"{_UNET}attn2.to_k", *_CLIP],
    "flux": [f"transformer.transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")],
}
STYLES = ("kohya", "diffusers", "ldm", "transformer", "lycoris")
PROGRAMS = ("a1111", "forge", "comfyui", "kohya", "diffusers")


def _file(path: Path, family: str, style: str) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA of each module under the names of a style, and the weights that it is of."""
    known, tensors, weights = FAMILIES[family], {}, {}
    for canonical in MODULES[family]:
        name = known.spelled(canonical, style)
        if not name:
            continue
        rows = sum(module.shape[0] for module in known.find(name))
        columns = known.modules[canonical].shape[1]
        ends = (
            (".lora_B.weight", ".lora_A.weight") if style == "diffusers" else (".lora_up.weight", ".lora_down.weight")
        )
        for end, shape in zip(ends, ((rows, 1), (1, columns)), strict=True):
            tensors[name + end] = torch.ones(shape)
        if style != "diffusers":
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
        for module in known.find(name):
            weights[module.name] = torch.zeros(module.shape)
    return write(path, tensors), weights


#: U-Nets have no such names, and the reader of diffusers does not know what it makes of Flux's
CELLS = [
    (family, style, program)
    for family in MODULES
    for style in STYLES
    for program in PROGRAMS
    if style != "transformer" or (family == "flux" and program != "diffusers")
]


@pytest.mark.parametrize("family, style, program", CELLS)
def test_a_file_is_said_to_load_where_its_names_are_read(family: str, style: str, program: str, tmp_path: Path) -> None:
    path, weights = _file(tmp_path / "x.safetensors", family, style)
    said = pk.inspect(path).loads[program]
    try:
        read = READERS[program](path, weights, family, 1.0)
        whole = not read.ignored and set(read.deltas) == set(weights)
    except Refused:
        whole = False
    assert (said == "") == whole, said


def test_changes_of_biases_and_half_an_attention_are_not_said_to_load(tmp_path: Path) -> None:
    path, _ = _file(tmp_path / "x.safetensors", "sd15", "kohya")
    tensors = {**load_file(path), "lora_unet_conv_in.diff_b": torch.ones(320)}
    loads = pk.inspect(write(tmp_path / "biased.safetensors", tensors)).loads
    assert [name for name, why in loads.items() if not why] == ["forge", "comfyui"]
    name = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    half = {f"{name}.lora_up.weight": torch.ones(1280, 1), f"{name}.lora_down.weight": torch.ones(1, 1280)}
    loads = pk.inspect(write(tmp_path / "half.safetensors", half)).loads
    assert "all of its projections" in loads["a1111"] and loads["comfyui"] == ""

    only = {key: tensor for key, tensor in load_file(path).items() if "te_" in key and "out_proj" not in key}
    assert "without attention" in pk.inspect(write(tmp_path / "only.safetensors", only)).loads["diffusers"]
