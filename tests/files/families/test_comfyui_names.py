"""ComfyUI's key map finds every name that is written for it: of every layer of every family."""

from __future__ import annotations

import pytest
from torch import nn

from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec
from peftkit.files.families.names import FAMILIES
from tests.support.classes import variants
from tests.support.readers import comfyui_networks

READ = {name: FAMILIES[name] for name in comfyui_networks.NETWORKS}
EACH = pytest.mark.parametrize("family", READ.values(), ids=READ)
#: of models that ComfyUI has no network for: Qwen-Image-Layered
_WITHOUT = {"transformer.time_text_embed.addition_t_embedding"}


def layers(family: Family) -> list[ModuleSpec]:
    """The Linears and convolutions of the denoiser, and of Anima's conditioner."""
    parts = [part for part in family.parts if part.denoiser or part.name == "text_conditioner"]
    found = {
        f"{part.name}.{path}"
        for part in parts
        for model in variants(family.name, part.name)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    every = [module for part in parts for module in part.modules.values()]
    return [module for module in every if module.name in found - _WITHOUT and "vace_blocks" not in module.name]


@EACH
def test_every_layer_is_found_under_its_name(family: Family) -> None:
    found = comfyui_networks.names(family.name)
    styles = {"ldm", "kohya"} & {*family.reads["comfyui"]}
    assert family.style("comfyui") in styles or family.name == "chroma"  # for which Flux.1's names come first
    for style in styles:
        names = {family.spell(module.name, style) for module in layers(family)}
        assert not names - found.keys()


@EACH
def test_every_layer_has_a_name(family: Family) -> None:
    """And nothing of ComfyUI's network is without a module here."""
    named = {family.spelled(module.name, "ldm") for part in family.parts for module in part.modules.values()}
    paths = {f"diffusion_model.{path}" for path in comfyui_networks.modules(family.name)}
    assert paths - named <= {"diffusion_model.norm_final"}  # of ComfyUI's Lumina, which has no use for it


@pytest.mark.parametrize("name", ["hidream", "qwen-image", "qwen-image-2.1"])
@pytest.mark.parametrize("style", ["diffusers", "lycoris"])
def test_simple_tuners_names_are_found(name: str, style: str) -> None:
    found = comfyui_networks.names(name)
    assert style in FAMILIES[name].reads["comfyui"]
    assert {FAMILIES[name].spell(module.name, style) for module in layers(FAMILIES[name])} <= found.keys()


def test_chromas_guidance_is_written_under_the_names_that_are_read() -> None:
    """By ComfyUI's list of diffusers' names, which is Flux.1's, it is not found."""
    family = FAMILIES["chroma"]
    guidance = "transformer.distilled_guidance_layer.layers.0.linear_1"
    assert family.style("comfyui") == "transformer" and family.style("comfyui", guidance) == "kohya"
    assert family.spell(guidance, "kohya") in comfyui_networks.names("chroma")
