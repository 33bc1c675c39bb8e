"""What the message of a refused export advises is done here, and works."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError
from tests.support.architectures import PARTS, T5, clip, conv, linear
from tests.support.cells import weights, wrapped
from tests.support.readers import READERS
from tests.support.zoo import train

Layers = dict[str, Callable[[], nn.Module]]
RESNET = "down_blocks.0.resnets.0.conv1"
TEXT = {"family": "sdxl", "component": "text_encoder_2"}
DIT = {"family": "sd3", "component": "transformer"}
UNET = {"family": "sd15", "component": "unet"}

#: what is adapted, for which program, and as what of which model
REFUSED: dict[str, tuple[Layers, str, dict[str, str]]] = {
    "a family": (PARTS["sd3", "transformer"], "a1111", DIT),
    "T5": (T5, "diffusers", {"family": "flux", "component": "text_encoder_2"}),
    "a text projection": ({**clip(5), "text_projection": linear(8, 8)}, "diffusers", TEXT),
    "a text projection for sd-scripts": ({**clip(5), "text_projection": linear(8, 8)}, "kohya", TEXT),
    "no attention": ({"text_model.encoder.layers.3.mlp.fc1": linear(16, 8)}, "diffusers", TEXT),
    "a layer outside the blocks": ({"conv_in": conv(8, 4, 3)}, "kohya", UNET),
    "a 1-dimensional convolution": ({RESNET: lambda: nn.Conv1d(8, 12, 3)}, "kohya", UNET),
    "a grouped convolution": ({RESNET: lambda: nn.Conv2d(8, 12, 3, groups=2)}, "diffusers", UNET),
}


@pytest.mark.parametrize("label", REFUSED)
def test_the_other_program_that_a_refusal_names_reads_it(label: str, tmp_path: Path) -> None:
    layers, target, model_is = REFUSED[label]
    model = wrapped("lora", layers)
    with pytest.raises(ExportError, match="export for") as refused:
        pk.export(model, tmp_path / "refused.safetensors", target, **model_is)
    assert list(tmp_path.iterdir()) == []
    advised = re.search(r"export for (\w+)", str(refused.value))
    assert advised is not None
    other, out = advised[1], tmp_path / "adapter.safetensors"
    report = pk.export(model, out, other, **model_is)
    prefix = "" if other == "lycoris" else f"{model_is['component']}."
    read = READERS[other](out, weights(model, prefix), None if other == "lycoris" else model_is["family"], 1.0)
    assert not read.ignored and len(read.deltas) == len(report.weights)


@pytest.mark.parametrize("target", ["lycoris", "peft"])
def test_rows_of_a_parameter_are_kept_in_this_librarys_own_format_or_merged(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    model: Any = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    other = copy.deepcopy(model)
    pk.wrap(model, "lora", targets="re:.*[qkv]_proj", rank=2)
    train(model)
    out = tmp_path / ("adapter.safetensors" if target == "lycoris" else "adapter")
    with pytest.raises(ExportError, match="own format, or merge it"):
        pk.export(model, out, target)
    expected = model["attention"](x, x, x)[0]
    pk.load(other, pk.save(model, tmp_path / "own.safetensors"))
    pk.merge(model, backup=None)
    for found in (other["attention"](x, x, x)[0], model["attention"](x, x, x)[0]):
        torch.testing.assert_close(found, expected)
