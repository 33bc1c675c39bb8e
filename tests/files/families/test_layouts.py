"""The family and layout of a checkpoint are found from its names and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers as hf
from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import nn

from peftkit.files.families import layouts
from peftkit.files.families.layouts import of_checkpoint
from peftkit.files.families.module import Component
from peftkit.files.families.names import FAMILIES, Family
from tests.support.classes import CASCADE, FAMILY, SDXL, VARIANTS, published, real, rows_of, t5


def original_shapes(part: Component) -> dict[str, tuple[int, ...]]:
    rows: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    for module in part.modules.values():
        rows[module.original] += rows_of(module)
        fused = (rows[module.original], *(module.shape or (2, 2))[1:])
        shapes[module.original] = module.shape[::-1] if module.transposed else fused
        if module.original_bias:
            shapes[module.original_bias] = fused[:1]
    return shapes


def state_shapes(model: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@FAMILY
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_an_original_checkpoint(family: Family, prefix: str) -> None:
    parts = family.parts if prefix.startswith("model") else family.parts[:1]
    shapes = {k: s for part in parts for k, s in original_shapes(part).items()}
    shapes = {k.replace("model.diffusion_model.", prefix): s for k, s in shapes.items()}
    layout = of_checkpoint({**shapes, "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)})
    same = all(m.original.removeprefix("model.diffusion_model.") == f"{m.path}.weight" for m in parts[0].specs)
    assert layout and layout.family is family and (layout.kind == "original" or same)
    assert len(layout.places) == sum(len(part.modules) for part in parts)
    for module in (module for part in parts for module in part.modules.values()):
        place = layout.locate(module.name)
        assert place and place.weight in shapes and (place.bias in shapes) is module.bias
        if prefix.startswith("model"):
            start, stop = module.rows_of(shapes[module.original][0])
            ours = (module.original, module.original_bias, start, stop, module.swapped, module.transposed)
            assert ours == (place.weight, place.bias, place.start, place.stop, place.swapped, place.transposed)


@FAMILY
@pytest.mark.parametrize("prefixed", [False, True])
def test_a_component_of_diffusers(family: Family, prefixed: bool) -> None:
    for part in family.parts:
        prefix = f"{part.name}." if prefixed else ""
        shapes = state_shapes(real(family.name, part.name), prefix)
        layout = of_checkpoint(shapes, [family])
        if part.general and not prefixed:  # other models have it too
            assert layout is None or not part.denoiser
            continue
        assert layout and layout.family is family and layout.kind == "diffusers"
        there = {m.name for m in part.modules.values() if not m.optional or f"{prefix}{m.path}.weight" in shapes}
        assert layout.places.keys() == there
        for name, place in layout.places.items():
            assert family.modules[name].fits(shapes[place.weight])
            assert (place.bias in shapes) is (f"{place.weight.removesuffix('weight')}bias" in shapes)
            assert (place.start, place.stop, place.swapped, place.transposed) == (None, None, False, False)
        found = of_checkpoint(shapes)
        assert found and found.places.keys() >= layout.places.keys() if part.denoiser else found


def test_text_encoders_alone() -> None:
    """With and without the level "text_model". One of several families goes to the first, or as the caller says."""
    memory = state_shapes(real("sd15", "text_encoder"))
    disk = {published(key): size for key, size in memory.items()}
    old = {f"cond_stage_model.transformer.{key}": size for key, size in memory.items()}
    for shapes in (memory, disk, old):
        layout = of_checkpoint(shapes)
        assert layout and (layout.family.name, len(layout.places)) == ("sd15", 99)
    for name, component, family in (("sd2", "text_encoder", "sd2"), ("sd3", "text_encoder_2", "sdxl")):
        layout = of_checkpoint(state_shapes(real(name, component)))
        assert layout and layout.family.name == family
    layout = of_checkpoint(state_shapes(real("flux", "text_encoder_2")), [FAMILIES["flux"]])
    assert layout and layout.locate("text_encoder_2.shared") == layouts.Placement("shared.weight", None)


def test_a_checkpoint_may_lack_and_change_some_tensors() -> None:
    """Flux schnell, inpainting models, an untied embedding, a bias left out."""
    whole = state_shapes(real("flux", "transformer"))
    schnell = {key: size for key, size in whole.items() if "guidance" not in key}
    layout = of_checkpoint(schnell)
    assert layout and layout.family.name == "flux"
    assert layout.locate("transformer.time_text_embed.guidance_embedder.linear_1") is None
    inpainting = {**state_shapes(real("sd15", "unet")), "conv_in.weight": (320, 9, 3, 3)}
    del inpainting["conv_out.bias"]
    layout = of_checkpoint(inpainting)
    assert layout and layout.family.name == "sd15"
    assert layout.locate("unet.conv_in") == layouts.Placement("conv_in.weight", "conv_in.bias")
    assert layout.locate("unet.conv_out") == layouts.Placement("conv_out.weight", None)
    t5 = state_shapes(real("flux", "text_encoder_2"))
    del t5["encoder.embed_tokens.weight"]
    layout = of_checkpoint(t5)
    assert layout and layout.locate("text_encoder_3.encoder.embed_tokens") is None


def _image_encoder(**sizes: Any) -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(num_hidden_layers=24, num_attention_heads=16, **sizes))


STRANGERS: dict[str, Callable[[], nn.Module]] = {
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3)),
    "Llama": lambda: hf.LlamaModel(hf.LlamaConfig(num_hidden_layers=2)),
    "CLIP's image encoder": lambda: _image_encoder(hidden_size=1024, intermediate_size=4096),
    "SigLIP's text encoder": lambda: hf.SiglipTextModel(hf.SiglipTextConfig(bos_token_id=0, eos_token_id=1)),
    "BART": lambda: hf.BartModel(hf.BartConfig(d_model=768, encoder_ffn_dim=3072)),
    "UMT5": lambda: hf.UMT5EncoderModel(t5(hf.UMT5Config, 256384)),
    "a ControlNet": lambda: ControlNetModel(**SDXL),
    # they keep the names of Flux.1 or of SD 2, and have other modules beside them
    "LongCat": diffusers.LongCatImageTransformer2DModel,
    "Bria": diffusers.BriaTransformer2DModel,
    "Bria Fibo": diffusers.BriaFiboTransformer2DModel,
    "Motif": diffusers.MotifVideoTransformer3DModel,
    "HunyuanImage": diffusers.HunyuanImageTransformer2DModel,
    "I2VGenXL": diffusers.I2VGenXLUNet,
    "UNet3D": diffusers.UNet3DConditionModel,
}
#: the same class in other sizes, and classes with the same modules
RELATIVES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "text to video": ("wan", diffusers.WanTransformer3DModel),
    "LTX-2.3": ("ltx2", VARIANTS["ltx2", "transformer"][0]),
    "VACE": ("wan", diffusers.WanVACETransformer3DModel),
    "Animate": ("wan", diffusers.WanAnimateTransformer3DModel),
    "the small prior": (
        "stable-cascade",
        lambda: diffusers.StableCascadeUNet(
            block_out_channels=(1536, 1536),
            num_attention_heads=(24, 24),
            down_num_layers_per_block=(4, 12),
            up_num_layers_per_block=(12, 4),
            conditioning_dim=1536,
            **CASCADE,
        ),
    ),
    "SkyReels": ("wan", diffusers.SkyReelsV2Transformer3DModel),
    "klein": (
        "flux2",
        lambda: diffusers.Flux2Transformer2DModel(
            guidance_embeds=False, num_layers=5, num_single_layers=20, num_attention_heads=24
        ),
    ),
    "LTX 2B": ("ltx", diffusers.LTXVideoTransformer3DModel),
    "Cosmos 2B": ("cosmos", lambda: diffusers.CosmosTransformer3DModel(num_attention_heads=16)),
    "PixArt-Sigma": (
        "pixart",
        lambda: diffusers.PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False),
    ),
    "Framepack": ("hunyuan-video", diffusers.HunyuanVideoFramepackTransformer3DModel),
    "Flux.1 of 8 blocks": ("flux", lambda: diffusers.FluxTransformer2DModel(num_layers=8, guidance_embeds=True)),
}


@pytest.mark.parametrize("relative", RELATIVES)
def test_every_size_of_a_family_is_recognised(relative: str) -> None:
    name, make = RELATIVES[relative]
    with torch.device("meta"):
        shapes = state_shapes(make())
    layout = of_checkpoint(shapes)
    assert layout and layout.family.name == name
    assert {place.weight for place in layout.places.values()} <= shapes.keys()


@pytest.mark.parametrize("stranger", STRANGERS)
def test_other_models_are_of_no_family(stranger: str) -> None:
    with torch.device("meta"):
        shapes = state_shapes(STRANGERS[stranger]())
    assert of_checkpoint(shapes) is None
    assert of_checkpoint({}) is None
