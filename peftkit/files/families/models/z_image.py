"""Z-Image and Z-Image-Turbo: ZImageTransformer2DModel.

Source: the class and the single-file loader of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, fused, renamed, same
from peftkit.files.families.transformer import ENCODERS_UNREAD, TRAINED_BY_KOHYA, TRANSFORMER

_LISTS = {"noise_refiner": 2, "context_refiner": 2, "layers": 30}


def z_image() -> Iterator[ModuleSpec]:
    """Yield the modules of ZImageTransformer2DModel."""
    yield from renamed({"all_x_embedder.2-1": "x_embedder"})
    yield from same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")
    yield from same("cap_embedder.0", bias=False)
    for blocks in _LISTS:
        block = f"{blocks}.{{}}."
        parts = {f"{block}attention.to_{part}": 1 for part in "qkv"}
        yield from fused(parts, f"{block}attention.qkv", bias=False)
        attention = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
        yield from renamed(attention, f"{block}attention.", f"{block}attention.", bias=False)
        yield from same("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", name=block, bias=False)
        yield from same("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", name=block, bias=False)
        if blocks != "context_refiner":
            yield from same("adaLN_modulation.0", name=block)
    final = {path: path for path in ("linear", "adaLN_modulation.1")}
    yield from renamed(final, "all_final_layer.2-1.", "final_layer.")


_Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    parts=(
        TRANSFORMER(anchor="layers.{}.attention.to_q", build=z_image, webui_ldm=False, depths=_LISTS),
        language_encoder("qwen3_4b", 36, normed=True),
    ),
    reads={**TRAINED_BY_KOHYA, "comfyui": ("ldm", "diffusers", "lycoris")},
    published="2025-11",
    base_model_version="zimage",
    architecture="z-image",
    implementation="https://github.com/Tongyi-MAI/Z-Image",
    resolution="1024x1024",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_Z_IMAGE,)
