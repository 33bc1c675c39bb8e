"""The text encoders that other models are too are known by what a pipeline or ComfyUI puts before their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftkit as pk
from peftkit.errors import ExportError
from peftkit.files.families.family import Family
from peftkit.files.families.layouts import of_checkpoint
from peftkit.files.families.module import Component
from peftkit.files.families.names import FAMILIES
from tests.support.classes import originals

#: of any size, so that they can be small here
ENCODERS = [
    (family, part)
    for family in FAMILIES.values()
    for part in family.parts[1:]
    if part.general and not any(spec.shape for spec in (*part.specs, *family.parts[0].specs))
]
EACH = pytest.mark.parametrize(
    "family, part", ENCODERS, ids=[f"{family.name}-{part.name}" for family, part in ENCODERS]
)


def lora(name: str, rows: int) -> dict[str, Tensor]:
    return {f"{name}.lora_up.weight": torch.randn(rows, 1), f"{name}.lora_down.weight": torch.randn(1, 1)}


def base(family: Family, part: Component) -> dict[str, Tensor]:
    """A checkpoint of the denoiser and of one encoder, as ComfyUI saves it."""
    return {key: tensor.float() for each in (family.parts[0], part) for key, tensor in originals(each).items()}


@EACH
@pytest.mark.parametrize("style", ["ldm", "kohya", "diffusers"])
def test_an_encoder_in_a_checkpoint_takes_its_adapter(
    family: Family, part: Component, style: str, tmp_path: Path
) -> None:
    weights = base(family, part)
    spec = next(spec for spec in part.specs if spec.path == part.anchor)
    module = next(iter(part.blocks(spec)))
    change = lora(family.spell(module.name, style), len(weights[module.original]))
    save_file(weights, tmp_path / "base.safetensors")
    save_file(change, tmp_path / "adapter.safetensors")
    pk.merge_checkpoint(
        tmp_path / "base.safetensors", {tmp_path / "adapter.safetensors": 1.0}, tmp_path / "out.safetensors"
    )
    up, down = change.values()
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.allclose(merged.pop(module.original), weights.pop(module.original) + up @ down)
    assert all(torch.equal(merged[key], tensor) for key, tensor in weights.items())


@EACH
def test_alone_it_is_of_no_family(family: Family, part: Component) -> None:
    """A Llama is a Llama, whichever pipelines read text by it; nor is a PEFT file of one."""
    shapes = {key.removeprefix(part.original): tensor.shape for key, tensor in originals(part).items()}
    assert of_checkpoint(shapes) is None
    found = family.find(f"base_model.model.{part.anchor.format(0)}")
    assert all(not module.name.startswith(f"{part.name}.") for module in found)


def test_a_program_that_adapts_no_text_encoder_is_not_given_one(tmp_path: Path) -> None:
    save_file(lora("text_encoder.layers.0.self_attn.q_proj", 8), tmp_path / "adapter.safetensors")
    for target in ("diffusers", "kohya"):
        with pytest.raises(ExportError, match="makes no adapter of this layer"):
            pk.export(tmp_path / "adapter.safetensors", tmp_path / "out.safetensors", target, family="z-image")
    report = pk.export(tmp_path / "adapter.safetensors", tmp_path / "out.safetensors", "comfyui", family="z-image")
    assert report.exact
    names = load_file(tmp_path / "out.safetensors")
    assert all(name.startswith("text_encoders.qwen3_4b.transformer.model.layers.0.") for name in names)
