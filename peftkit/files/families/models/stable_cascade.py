"""Stable Cascade's prior (stage C), of both sizes: StableCascadeUNet. Nobody trains adapters of its decoder (stage B).

Sources: the class and the single-file loader of diffusers, the StableCascade repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftkit.files.families.encoders import CLIP_G
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, entry, fused, same
from peftkit.files.families.transformer import TRANSFORMER

#: list of blocks -> how many groups of three blocks it has, in the small and in the large prior
_GROUPS = {"down_blocks.0": (4, 8), "down_blocks.1": (12, 24), "up_blocks.0": (12, 24), "up_blocks.1": (4, 8)}


def stage_c() -> Iterator[ModuleSpec]:
    """Yield the modules of the prior: blocks of residual layers, of the timestep and of attention take turns."""
    yield from same("clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "embedding.1", "clf.1")
    yield from same("down_downscalers.1.1.blocks.0", "up_upscalers.0.1.blocks.1")
    for blocks, (small, large) in _GROUPS.items():
        for group in range(large):
            yield from _group(blocks, 3 * group, optional=group >= small)


def _group(blocks: str, first: int, optional: bool) -> Iterator[ModuleSpec]:
    residual, timestep, attention = (f"{blocks}.{first + i}." for i in range(3))
    yield from same("depthwise", "channelwise.0", "channelwise.4", name=residual, optional=optional)
    yield from same("mapper", "mapper_sca", "mapper_crp", name=timestep, optional=optional)
    name, original = f"{attention}attention.", f"{attention}attention.attn."
    for module in fused({f"{name}to_{part}": 1 for part in "qkv"}, f"{original}in_proj", optional=optional):
        yield replace(
            module,
            original=f"{original}in_proj_weight",
            original_bias=f"{original}in_proj_bias",
            spelled=original + module.name.rpartition(".")[2],
        )
    yield entry(f"{name}to_out.0", f"{original}out_proj", optional=optional)
    yield entry(f"{attention}kv_mapper.1", f"{attention}kv_mapper.1", optional=optional)


_STABLE_CASCADE = Family(
    name="stable-cascade",
    title="Stable Cascade",
    parts=(
        TRANSFORMER(
            name="prior",
            webui=("lora_unet", "lora_prior_unet"),
            anchor="clip_txt_mapper",
            build=stage_c,
        ),
        CLIP_G(
            name="text_encoder",
            webui=("lora_te", "lora_te1", "lora_prior_te"),
            prefixes=("text_encoder.clip_g.transformer.",),
            general=True,
        ),
    ),
    reads={"comfyui": ("ldm", "kohya"), "lycoris": ("lycoris",), "peft": ("peft",)},
    published="2024-02",
    base_model_version="stable_cascade",
    architecture="stable-cascade-v1-prior",
    implementation="https://github.com/Stability-AI/StableCascade",
    resolution="1024x1024",
)

FAMILIES = (_STABLE_CASCADE,)
