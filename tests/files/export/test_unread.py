"""Layers of which a program makes no adapter, and layers that it has in another order: nothing is written unread."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError
from peftkit.files.export import programs
from peftkit.files.families.names import FAMILIES
from tests.support.architectures import PARTS, linear, looked_for
from tests.support.cells import require_read, wrapped
from tests.support.readers import a1111, comfyui, forge, kohya
from tests.support.zoo import train

UNREAD = [
    (family, component, path)
    for family, component in PARTS
    if family in ("sd15", "sdxl", "flux")
    for path in sorted(PARTS[family, component].keys() - looked_for(family, component, "kohya").keys())
]
BLOCK = {"unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "transformer": "x_embedder"}


def test_what_sd_scripts_makes_no_adapter_of() -> None:
    unet = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert {path for family, _, path in UNREAD if family == "sd15"} == unet
    assert {path for family, _, path in UNREAD if family == "sdxl"} - unet == {
        "add_embedding.linear_1",
        "add_embedding.linear_2",
    }
    assert {path for family, _, path in UNREAD if family == "flux"} == {"norm_out.linear", "proj_out"}


@pytest.mark.parametrize("family, component, path", UNREAD)
def test_a_layer_sd_scripts_ignores_is_refused_and_what_the_message_says_works(
    family: str, component: str, path: str, tmp_path: Path
) -> None:
    parts = PARTS[family, component]
    model = wrapped("lora", {BLOCK[component]: parts[BLOCK[component]], path: parts[path]})
    out = tmp_path / "adapter.safetensors"
    with pytest.raises(ExportError, match=path) as refused:
        pk.export(model, out, "kohya", family=family, component=component)
    assert not out.exists()
    ignore = re.search(r"ignore='(.+?)'", str(refused.value))
    assert ignore is not None
    saved = pk.save(model, tmp_path / "saved.safetensors")
    report = pk.export(saved, out, "kohya", family=family, component=component, ignore=ignore[1])
    assert [w.weight for w in report.weights] == [BLOCK[component]]
    pk.export(model, tmp_path / "comfyui.safetensors", "comfyui", family=family, component=component)


NAMES: dict[str, Callable[[dict[str, torch.Tensor], str], Mapping[str, Any]]] = {
    "a1111": a1111.names,
    "forge": forge.names,
    "comfyui": comfyui.names,
    "kohya": lambda weights, family: kohya.names(weights, family, "lora_unet_"),
}
SWAPPED = {"norm_out.linear": linear(16, 8), "transformer_blocks.23.norm1_context.linear": linear(16, 8)}
ADAPTERS = (
    "lora",
    "loha",
    "lokr",
    "loldu",
    "full",
    "dora",
    "dora in",
    "dora of lokr in",
    "oft",
    "boft",
    "ia3",
    "glora",
)


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("target", ["forge", "comfyui", "kohya", "lycoris", "diffusers", "peft"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_layers_whose_halves_change_places_are_read_right(
    adapter: str, target: str, family: str, tmp_path: Path
) -> None:
    """The modulation of Flux' and SD 3's last layer, and of the text in SD 3's last block."""
    layers = dict(list(SWAPPED.items())[: 1 + (family == "sd3")])
    model = wrapped(adapter, layers)
    out = tmp_path / ("adapter" if target == "peft" else "adapter.safetensors")
    if (family, target) == ("flux", "kohya"):
        with pytest.raises(ExportError, match="norm_out"):
            pk.export(model, out, target, family=family, component="transformer")
        return
    report = pk.export(model, out, target, family=family, component="transformer")
    own = target in ("lycoris", "peft")
    require_read(out, target, report, model, None if own else family, "" if own else "transformer.")
    turned = {"forge": ("glora", "full"), "comfyui": ("oft", "boft", "glora")}.get(target, ())
    assert {w.how for w in report.weights} != {"exact"} or adapter not in turned


def test_sd3_goes_to_forge_under_the_original_networks_names(tmp_path: Path) -> None:
    """It has no names of diffusers for SD 3, and drops a file of more than twelve tensors that it does not know."""
    model = wrapped("lora", PARTS["sd3", "transformer"])
    out = tmp_path / "adapter.safetensors"
    report = pk.export(model, out, "forge", family="sd3", component="transformer")
    require_read(out, "forge", report, model, "sd3", "transformer.")
    assert all(w.written.startswith("lora_unet_") for w in report.weights)
    again = tmp_path / "again.safetensors"
    report = pk.export(out, again, "forge", family="sd3")
    assert {w.how for w in report.weights} == {"exact"}
    assert pk.diff(out, again).equal


@pytest.mark.parametrize("bake", [False, True])
@pytest.mark.parametrize("path", ["linear", "geodesic"])
def test_the_report_says_that_a_geodesic_strength_is_no_other_programs(path: str, bake: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16))
    pk.wrap(model, "oft", targets="0", block_size=4, path=path)
    train(model)
    report = pk.export(model, tmp_path / "adapter.safetensors", "lycoris", bake=bake)
    assert ("LyCORIS adds s·ΔW" in str(report)) == (path == "geodesic")


@pytest.mark.parametrize("target", ["a1111", "forge", "comfyui", "kohya"])
@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl", "sd3", "flux"])
def test_every_matrix_of_a_family_has_a_name_that_the_program_looks_for(family: str, target: str) -> None:
    """But those of embeddings, which are refused, and what is known to be ignored, which is too."""
    known, goal = FAMILIES[family], programs.get(target)
    style = known.style(target)
    if style is None:
        assert (family, target) in {("sd3", "a1111"), ("flux", "a1111")}
        return
    matrices = [m for m in known.modules.values() if len(m.shape) > 1 and "embed" not in m.path.rpartition(".")[2]]
    matrices = [m for m in matrices if not m.path.endswith(("shared", "relative_attention_bias"))]
    weights = {m.name: torch.zeros(1 + m.swapped, *(1,) * (len(m.shape) - 1)) for m in matrices}
    names = NAMES[target](weights, family)
    written = [
        m
        for m in matrices
        if known.looked_for(m.name, target) and (goal.text_projection or m.path != "text_projection")
    ]
    assert len(written) > 340
    assert [m.name for m in written if known.spelled(m.name, style) not in names] == []
