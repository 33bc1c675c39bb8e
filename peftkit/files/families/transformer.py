"""What the transformers of several families have in common: their prefixes, and the two streams of a joint block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from peftkit.files.families.module import Component


class Stream(NamedTuple):
    """What diffusers calls the parts of the image or of the text half of a joint block."""

    modulation: str
    qkv: tuple[str, str, str]
    norms: tuple[str, str]
    out: str
    up: str
    down: str


IMAGE = Stream(
    modulation="norm1.linear",
    qkv=("attn.to_q", "attn.to_k", "attn.to_v"),
    norms=("attn.norm_q", "attn.norm_k"),
    out="attn.to_out.0",
    up="ff.net.0.proj",
    down="ff.net.2",
)
TEXT = Stream(
    modulation="norm1_context.linear",
    qkv=("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    norms=("attn.norm_added_q", "attn.norm_added_k"),
    out="attn.to_add_out",
    up="ff_context.net.0.proj",
    down="ff_context.net.2",
)


TRANSFORMER = partial(
    Component,
    name="transformer",
    original="model.diffusion_model.",
    comfy="diffusion_model",
    webui=("lora_unet", "lora_transformer", "oft_unet"),
    anchor="transformer_blocks.{}.attn.to_q",
    webui_ldm=True,
    complete=True,
)

#: The programs that read most transformers: ComfyUI by the paths of the checkpoint it loads, diffusers, and LyCORIS and
#: PEFT by the paths of the class
READS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "comfyui": ("ldm", "kohya"),
        "lycoris": ("lycoris",),
        "diffusers": ("diffusers",),
        "peft": ("peft",),
    }
)
#: and those that sd-scripts or musubi-tuner train
TRAINED_BY_KOHYA: Mapping[str, tuple[str, ...]] = MappingProxyType({**READS, "kohya": ("kohya",)})
#: None of these programs adapts the text encoders of the families that they read so
ENCODERS_UNREAD: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"diffusers": ("text_encoder*",), "kohya": ("text_encoder*",)}
)
