"""Qwen-Image and Qwen-Image-Edit: QwenImageTransformer2DModel, whose names the original has too.

Source: the class of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, same
from peftkit.files.families.transformer import ENCODERS_UNREAD, TRAINED_BY_KOHYA, TRANSFORMER


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

FAMILIES = (_QWEN_IMAGE,)
