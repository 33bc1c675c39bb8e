"""The real classes of every model family, in full size and without memory, and the spellings of their modules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
import transformers as hf
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from peftkit.errors import OptionError
from peftkit.files.families import layouts
from peftkit.files.families.module import Component, ModuleSpec
from peftkit.files.families.names import FAMILIES, Family

STYLES = ("kohya", "diffusers", "ldm", "transformer", "lycoris", "peft")
FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)

with torch.device("meta"):
    torch.empty(0)  # torch remembers its constructors at the first use: here, before a fixture wraps torch.empty

SDXL: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {**SDXL, "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
}
_UNETS["kolors"] = {
    **_UNETS["sdxl"],
    "projection_class_embeddings_input_dim": 5632,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
}
_SD3: dict[str, dict[str, Any]] = {
    "sd3": {"num_layers": 24},
    "sd35-medium": {"num_layers": 24, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    "sd35-large": {"num_layers": 38, "qk_norm": "rms_norm"},
}


#: The transformers of the other families, in the published configuration that has the most modules
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "auraflow": ("AuraFlowTransformer2DModel", {}),
    "chroma": ("ChromaTransformer2DModel", {}),
    "cosmos": ("CosmosTransformer3DModel", {"num_layers": 36}),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "num_layers": 16,
            "num_single_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 20,
            "caption_channels": [4096, 4096],
            "text_emb_dim": 2048,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (64, 32, 32),
            "max_resolution": (128, 128),
            "llama_layers": list(range(48)),
        },
    ),
    "hunyuan-video": ("HunyuanVideoTransformer3DModel", {}),
    "ltx": ("LTXVideoTransformer3DModel", {"num_layers": 48}),
    "ltx2": ("LTX2VideoTransformer3DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {}),
    "pixart": ("PixArtTransformer2DModel", {"caption_channels": 4096}),
    "qwen-image": ("QwenImageTransformer2DModel", {"use_additional_t_cond": True}),
    "qwen-image-2.1": ("QwenImage21Transformer2DModel", {}),
    "wan": ("WanTransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}),
    "z-image": ("ZImageTransformer2DModel", {}),
}
CASCADE: dict[str, Any] = {"clip_text_in_channels": 1280, "clip_image_in_channels": 768, "switch_level": [False]}
#: The language models that are text encoders, by the family: configuration, class, layers
_LANGUAGE: dict[str, tuple[type[Any], type[Any], int]] = {
    "cosmos": (hf.Qwen3Config, hf.Qwen3Model, 28),  # of Anima
    "flux2": (hf.MistralConfig, hf.MistralModel, 40),
    "hunyuan-video": (hf.LlamaConfig, hf.LlamaModel, 32),
    "hidream": (hf.LlamaConfig, hf.LlamaModel, 32),
    "ltx2": (hf.Gemma3TextConfig, hf.Gemma3TextModel, 48),
    "lumina2": (hf.Gemma2Config, hf.Gemma2Model, 26),
    "qwen-image": (hf.Qwen2Config, hf.Qwen2Model, 28),  # the layers of Qwen2.5-VL
    "qwen-image-2.1": (hf.Qwen3Config, hf.Qwen3Model, 36),  # the layers of Qwen3-VL
    "z-image": (hf.Qwen3Config, hf.Qwen3Model, 36),
}
#: Models of a family that have modules beside those of its class
VARIANTS: dict[tuple[str, str], tuple[Callable[[], nn.Module], ...]] = {
    ("wan", "transformer"): (
        lambda: diffusers.WanVACETransformer3DModel(image_dim=1280, added_kv_proj_dim=5120),
        diffusers.WanAnimateTransformer3DModel,
    ),
    ("ltx2", "transformer"): (
        lambda: diffusers.LTX2VideoTransformer3DModel(
            gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True
        ),
    ),
}
#: How many rows one of the equal parts of a fused layer has, where diffusers' converter has that number written in it
_UNIT = {"hunyuan-video": 3072, "lumina2": 768}


def _clip(kind: Callable[[Any], nn.Module], width: int, layers: int) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return kind(hf.CLIPTextConfig(**sizes, num_hidden_layers=layers, num_attention_heads=width // 64))


def t5(config: type[Any], vocab_size: int) -> Any:
    sizes = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}
    return config(**sizes, vocab_size=vocab_size, feed_forward_proj="gated-gelu")


def _language(family: str) -> nn.Module:
    config, kind, layers = _LANGUAGE[family]
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    return kind(config(**sizes, num_hidden_layers=layers, num_key_value_heads=2, vocab_size=99, pad_token_id=0))


def _sd3(num_layers: int, **options: Any) -> nn.Module:
    text: dict[str, Any] = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    width: dict[str, Any] = {"num_attention_heads": num_layers, "caption_projection_dim": 64 * num_layers}
    return SD3Transformer2DModel(num_layers=num_layers, attention_head_dim=64, **width, **text, **options)


@cache
def real(family: str, component: str) -> nn.Module:
    """The class that diffusers' pipeline of the family has, in its published configuration."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' Chroma uses what diffusers calls deprecated
        match family, component:
            case _, "unet":
                return UNet2DConditionModel(**_UNETS[family])
            case _, "transformer" if family in _TRANSFORMERS:
                name, sizes = _TRANSFORMERS[family]
                return getattr(diffusers, name)(**sizes)
            case _, "transformer":
                return _sd3(**_SD3[family])
            case _, "prior":
                return diffusers.StableCascadeUNet(**CASCADE)
            case _, "text_conditioner":
                return diffusers.AnimaTextConditioner()
            case (_, "text_encoder_4") | ("cosmos" | "flux2" | "hunyuan-video" | "ltx2" | "lumina2", "text_encoder"):
                return _language(family)
            case "qwen-image" | "qwen-image-2.1" | "z-image", "text_encoder":
                return _language(family)
            case ("flux", "text_encoder_2") | ("chroma" | "ltx" | "pixart", "text_encoder") | (_, "text_encoder_3"):
                return hf.T5EncoderModel(t5(hf.T5Config, 32128))
            case "wan" | "auraflow", "text_encoder":
                return hf.UMT5EncoderModel(t5(hf.UMT5Config, 256384))
            case ("hunyuan-video", "text_encoder_2"):
                return _clip(hf.CLIPTextModel, 768, 12)
            case "stable-cascade", "text_encoder":
                return _clip(hf.CLIPTextModelWithProjection, 1280, 32)
            case _, "text_encoder_2":
                return _clip(hf.CLIPTextModelWithProjection, 1280, 32)
            case "sd2", _:
                return _clip(hf.CLIPTextModel, 1024, 23)
            case "sd15" | "sdxl" | "flux", _:
                return _clip(hf.CLIPTextModel, 768, 12)
            case _:
                return _clip(hf.CLIPTextModelWithProjection, 768, 12)


@cache
def variants(family: str, component: str) -> tuple[nn.Module, ...]:
    """The models of a component: its class, and those that have modules beside it."""
    with torch.device("meta"):
        return (real(family, component), *(make() for make in VARIANTS.get((family, component), ())))


def published(path: str) -> str:
    """With the level of CLIPTextModel that transformers 5.6 left out."""
    return f"text_model.{path}" if re.match(r"(embeddings|encoder\.layers|final_layer_norm)\b", path) else path


@cache
def originals(part: Component) -> Mapping[str, Tensor]:
    """A checkpoint of a component in its original layout, in which every row is another number."""
    shapes: dict[str, tuple[int, ...]] = {}
    unit = next((_UNIT.get(family.name, 2) for family in FAMILIES.values() if part in family.parts), 2)
    for module in part.modules.values():
        own = module.stop * (unit if module.of else 1) if module.stop else rows_of(module, unit)
        rows = max(own, *shapes.get(module.original, (0,)))
        shape = (rows,) if len(module.shape) == 1 else (rows, 1)
        shapes[module.original] = module.shape[::-1] if module.transposed else shape
        if module.original_bias:
            shapes[module.original_bias] = (rows,)
    sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    numbers = torch.arange(sum(sizes.values()), dtype=torch.float64).split(list(sizes.values()))
    return {key: n.view(shapes[key]) for key, n in zip(sizes, numbers, strict=True)}


def rows_of(module: ModuleSpec, unit: int = 2) -> int:
    """How many rows a module has, in a model of any size where its family has several."""
    return module.shape[0] if module.shape else module.share * unit


def taken(tensors: Mapping[str, Tensor], place: ModuleSpec | layouts.Placement, key: str | None) -> Tensor:
    """What ModuleSpec and Placement say of a tensor, done."""
    assert key is not None
    start, stop = place.start, place.stop
    if isinstance(place, ModuleSpec):
        start, stop = place.rows_of(tensors[key].shape[0])
    tensor = tensors[key][start:stop]
    if place.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return tensor.T if place.transposed and tensor.ndim == 2 else tensor


def spellings(family: Family, style: str) -> Iterator[tuple[ModuleSpec, str]]:
    for module in family.modules.values():
        with suppress(OptionError):
            yield module, family.spell(module.name, style)


def shape(family: Family, foreign: str) -> tuple[int, int] | None:
    modules = family.find(foreign)
    if not modules[0].shape:
        return None
    return sum(m.shape[0] for m in modules), torch.Size(modules[0].shape[1:]).numel()
