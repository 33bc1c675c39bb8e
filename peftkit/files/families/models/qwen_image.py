"""Qwen-Image and Qwen-Image-Edit, and Qwen-Image-2.1: classes of diffusers whose names the original has too.

Sources: the classes and the single-file loader of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftkit.files.families.encoders import language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, fused, same
from peftkit.files.families.transformer import ENCODERS_UNREAD, READS, TRAINED_BY_KOHYA, TRANSFORMER


def qwen_image() -> Iterator[ModuleSpec]:
    """Yield the modules of QwenImageTransformer2DModel."""
    yield from same("linear_1", "linear_2", name="time_text_embed.timestep_embedder.")
    yield from same("time_text_embed.addition_t_embedding", bias=False, optional=True)  # of Qwen-Image-Layered
    yield from same("txt_norm", bias=False)
    yield from same("img_in", "txt_in")
    block = "transformer_blocks.{}."
    yield from same("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", name=f"{block}attn.")
    yield from same("to_out.0", "to_add_out", name=f"{block}attn.")
    yield from same("norm_q", "norm_k", "norm_added_q", "norm_added_k", name=f"{block}attn.", bias=False)
    for stream in ("img", "txt"):
        yield from same("mod.1", "mlp.net.0.proj", "mlp.net.2", name=f"{block}{stream}_")
    yield from same("norm_out.linear", "proj_out")


_QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    parts=(
        TRANSFORMER(build=qwen_image, depths={"transformer_blocks": 60}),
        language_encoder("qwen25_7b", 28, biased=True),
    ),
    reads={**TRAINED_BY_KOHYA, "comfyui": ("ldm", "kohya", "diffusers", "lycoris")},
    published="2025-08",
    base_model_version="qwen_image",
    architecture="qwen-image",
    implementation="https://github.com/QwenLM/Qwen-Image",
    resolution="1328x1328",
    unread=ENCODERS_UNREAD,
)


def qwen_image_21() -> Iterator[ModuleSpec]:
    """Yield the modules of QwenImage21Transformer2DModel; ComfyUI's checkpoint has two layers of a block in one."""
    yield from same("linear_1", "linear_2", name="time_text_embed.timestep_embedder.", bias=False)
    yield from same("text_norm", "in_layer", "out_layer", name="txt_in.", bias=False)
    yield from same("img_in", "modulation.1", "norm_out.linear", "proj_out", bias=False)
    block = "transformer_blocks.{}."
    yield from same("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", name=f"{block}attn.", bias=False)
    layer = f"{block}img_mlp."
    for module in fused({f"{layer}gate_layer": 1, f"{layer}proj": 1}, f"{layer}gate_up", bias=False):
        yield replace(module, spelled=module.name)
    yield from same("out", name=layer, bias=False)


_QWEN_IMAGE_21 = replace(
    _QWEN_IMAGE,
    name="qwen-image-2.1",
    title="Qwen-Image-2.1",
    parts=(
        TRANSFORMER(build=qwen_image_21, depths={"transformer_blocks": 32}),
        language_encoder("qwen3vl_8b", 36, normed=True),
    ),
    reads={**READS, "comfyui": ("ldm", "kohya", "diffusers", "lycoris")},
    published="2026-09",
    base_model_version="qwen_image_2_1",
    architecture="qwen-image-2.1",
    resolution="2048x2048",
)

FAMILIES = (_QWEN_IMAGE, _QWEN_IMAGE_21)
