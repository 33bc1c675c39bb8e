"""Lumina-Image 2.0 and its descendants: Lumina2Transformer2DModel.

Source: the class and the single-file loader of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, entry, fused, renamed
from peftkit.files.families.transformer import ENCODERS_UNREAD, TRAINED_BY_KOHYA, TRANSFORMER

_LISTS = {"noise_refiner": 2, "context_refiner": 2, "layers": 26}


def lumina2() -> Iterator[ModuleSpec]:
    """Yield the modules of Lumina2Transformer2DModel; three queries share a key and a value."""
    outer = {
        "x_embedder": "x_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_caption_embed.caption_embedder.1": "cap_embedder.1",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    }
    yield from renamed(outer)
    yield from renamed({"time_caption_embed.caption_embedder.0": "cap_embedder.0"}, bias=False)
    for blocks in _LISTS:
        block, modulated = f"{blocks}.{{}}.", blocks != "context_refiner"
        shares = {f"{block}attn.to_q": 3, f"{block}attn.to_k": 1, f"{block}attn.to_v": 1}
        yield from fused(shares, f"{block}attention.qkv", bias=False)
        attention = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
        yield from renamed(attention, f"{block}attn.", f"{block}attention.", bias=False)
        yield from renamed(
            {f"linear_{i}": f"w{i}" for i in (1, 2, 3)}, f"{block}feed_forward.", f"{block}feed_forward.", bias=False
        )
        norms = {"norm1.norm" if modulated else "norm1": "attention_norm1", "norm2": "attention_norm2"}
        yield from renamed({**norms, "ffn_norm1": "ffn_norm1", "ffn_norm2": "ffn_norm2"}, block, block, bias=False)
        if modulated:
            yield entry(f"{block}norm1.linear", f"{block}adaLN_modulation.1")


_LUMINA2 = Family(
    name="lumina2",
    title="Lumina-Image 2.0",
    parts=(
        TRANSFORMER(anchor="layers.{}.attn.to_q", build=lumina2, depths=_LISTS),
        language_encoder("gemma2_2b", 26, sandwiched=True),
    ),
    reads=TRAINED_BY_KOHYA,
    published="2025-01",
    base_model_version="lumina2",
    architecture="lumina-2",
    implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0",
    resolution="1024x1024",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_LUMINA2,)
