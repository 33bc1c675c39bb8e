"""The families' modules against the real classes and the original checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as single_file
from torch import Tensor, nn

from peftkit.files.families.module import Component
from peftkit.files.families.names import FAMILIES, Family
from tests.support.classes import originals, published, taken, variants

PARTS = [(family, part) for family in FAMILIES.values() for part in family.parts]
PART = pytest.mark.parametrize("family, part", PARTS, ids=[f"{family.name}-{part.name}" for family, part in PARTS])


# -- the real classes --------------------------------------------------------------------------------------------------


def weighted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if getattr(module, "weight", None) is not None)


@PART
def test_modules_are_those_of_the_real_class(family: Family, part: Component) -> None:
    models = variants(family.name, part.name)
    theirs = {
        published(path): (tuple(module.weight.shape), getattr(module, "bias", None) is not None)
        for path, module in chain(*map(weighted, models))
        if not path.startswith("motion_encoder.")  # of Wan Animate: makes numbers of a face, in layers of its own kind
    }
    assert {m.path: m.bias for m in part.modules.values()} == {path: bias for path, (_, bias) in theirs.items()}
    assert all(m.fits(theirs[m.path][0]) for m in part.modules.values())
    assert all(family.modules[f"{part.name}.{path}"] is module for path, module in part.modules.items())
    tensors = {f"{m.path}.{kind}" for m in part.modules.values() for kind in ("weight", "bias")[: 1 + m.bias]}
    bare = {key for key in set(map(published, models[0].state_dict())) - tensors if key.endswith((".weight", ".bias"))}
    assert not bare
    assert all(family.find(f"{part.name}.{path}")[0].path == published(path) for path, _ in weighted(models[0]))


def test_counts() -> None:
    """Of modules; and of the tensors that the published checkpoints have under model.diffusion_model."""
    modules = {name: [len(part.modules) for part in family.parts] for name, family in FAMILIES.items()}
    assert modules == {
        "sd15": [391, 99],
        "sd2": [391, 187],
        "sdxl": [1050, 99, 260],
        "kolors": [1051],
        "stable-cascade": [711, 260],
        "sd3": [341, 100, 260, 220],
        "sd35-medium": [515, 100, 260, 220],
        "sd35-large": [689, 100, 260, 220],
        "flux": [656, 99, 220],
        "auraflow": [326, 243],
        "chroma": [590, 220],
        "cosmos": [727, 105, 310],
        "flux2": [331, 362],
        "hidream": [1304, 100, 260, 220, 290],
        "hunyuan-video": [712, 290, 99],
        "ltx": [679, 220],
        "ltx2": [2240, 626],
        "lumina2": [425, 288],
        "pixart": [291, 220],
        "qwen-image": [1088, 254],
        "qwen-image-2.1": [297, 398],
        "wan": [938, 243],
        "z-image": [481, 398],
    }
    tensors = {name: len(originals(family.parts[0])) for name, family in FAMILIES.items()}
    assert tensors["sd15"] == tensors["sd2"] == 686
    assert tensors["sdxl"] == 1680
    assert tensors["flux"] == 780
    optional = [m.path for m in FAMILIES["flux"].parts[0].modules.values() if m.optional]
    assert optional == [*(f"time_text_embed.guidance_embedder.linear_{i}" for i in (1, 2)), "x_embedder"]
    assert all(key.startswith("model.diffusion_model.") for key in originals(FAMILIES["sdxl"].parts[0]))


# -- the original checkpoint -------------------------------------------------------------------------------------------


#: diffusers' conversion of each transformer but SD 3's; none of PixArt, whose conversion is a script
CONVERTERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "auraflow": lambda tensors: single_file.convert_auraflow_transformer_checkpoint_to_diffusers(
        {**tensors, "positional_encoding": None, "register_tokens": None}
    ),
    "chroma": single_file.convert_chroma_transformer_checkpoint_to_diffusers,
    "cosmos": single_file.convert_cosmos_transformer_checkpoint_to_diffusers,
    "flux": single_file.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file.convert_flux2_transformer_checkpoint_to_diffusers,
    "hidream": single_file.convert_hidream_transformer_to_diffusers,
    "hunyuan-video": single_file.convert_hunyuan_video_transformer_to_diffusers,
    "ltx": single_file.convert_ltx_transformer_checkpoint_to_diffusers,
    # whose loader of LoRAs renames prompt_adaln_single, and that of whole checkpoints does not
    "ltx2": lambda tensors: {
        key.replace("prompt_adaln_single", "prompt_adaln"): tensor
        for key, tensor in single_file.convert_ltx2_transformer_to_diffusers(tensors).items()
    },
    "lumina2": single_file.convert_lumina2_to_diffusers,
    "qwen-image": lambda tensors: tensors,
    "qwen-image-2.1": single_file.convert_qwen_image21_transformer_checkpoint_to_diffusers,
    "stable-cascade": single_file.convert_stable_cascade_unet_single_file_to_diffusers,
    "wan": single_file.convert_wan_transformer_to_diffusers,
    "z-image": single_file.convert_z_image_transformer_checkpoint_to_diffusers,
}


def _converted(family: Family, part: Component, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own conversion."""
    if not part.denoiser and all(m.original == f"{part.original}{m.path}.weight" for m in part.specs):
        return {key.removeprefix(part.original): tensor for key, tensor in tensors.items()}  # the names are the class's
    if part.name == "unet":
        config = {
            "layers_per_block": 2,
            "addition_embed_type": "text_time" if family.name in ("sdxl", "kolors") else None,
        }
        return single_file.convert_ldm_unet_checkpoint(tensors, config)
    if part.denoiser and family.name in CONVERTERS:
        bare = {key.removeprefix(part.original): tensor for key, tensor in tensors.items()}
        return {key: tensor for key, tensor in CONVERTERS[family.name](bare).items() if tensor is not None}
    if part.name == "transformer":
        tensors["model.diffusion_model.pos_embed"] = torch.zeros(1)
        return single_file.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    if "t5" in part.original:
        return single_file.convert_sd3_t5_checkpoint_to_diffusers(tensors)
    if part.original.endswith("model."):
        text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=1024))
        return single_file.convert_open_clip_checkpoint(text_model, tensors, prefix=part.original)
    return single_file.convert_ldm_clip_checkpoint(tensors, part.original)


@PART
def test_diffusers_converts_the_original_to_what_the_table_says(family: Family, part: Component) -> None:
    tensors = originals(part)
    if family.name == "pixart":
        pytest.skip("diffusers converts PixArt by a script that is no part of the package")
    projection = {
        key: tensors[key] for key in tensors if "encoder_hid_proj" in key
    }  # Kolors has no original checkpoint
    converted = _converted(family, part, {**tensors})
    converted.pop("pos_embed.pos_embed", None)
    converted |= {key.removeprefix(part.original): tensor for key, tensor in projection.items()}
    expected = {f"{m.path}.weight": taken(tensors, m, m.original) for m in part.modules.values()}
    expected |= {f"{m.path}.bias": taken(tensors, m, m.original_bias) for m in part.modules.values() if m.bias}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in expected.items())
