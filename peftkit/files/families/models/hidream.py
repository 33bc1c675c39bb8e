"""HiDream-I1 and E1: HiDreamImageTransformer2DModel, whose names the original has too.

Source: the class of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from peftkit.files.families.encoders import CLIP_G, CLIP_L, T5, clip, language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, same
from peftkit.files.families.transformer import ENCODERS_UNREAD, READS, TRANSFORMER

#: its CLIPs have more positions than the others
_TOKENS = "text_model.embeddings.token_embedding"
_EXPERTS = ("shared_experts", *(f"experts.{i}" for i in range(4)))


def hidream() -> Iterator[ModuleSpec]:
    """Yield the modules of HiDreamImageTransformer2DModel."""
    yield from same("linear_1", "linear_2", name="t_embedder.timestep_embedder.")
    yield from same("linear_1", "linear_2", name="p_embedder.pooled_embedder.")
    yield from same("x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1")
    yield from same("caption_projection.{}.linear", bias=False)
    for blocks, streams in (("double_stream_blocks", ("", "_t")), ("single_stream_blocks", ("",))):
        block = f"{blocks}.{{}}.block."
        yield from same("adaLN_modulation.1", name=block)
        yield from same("ff_i.gate", name=block, bias=False)
        for stream in streams:
            layers, norms = ("to_q", "to_k", "to_v", "to_out"), ("q_rms_norm", "k_rms_norm")
            yield from same(*(layer + stream for layer in layers), name=f"{block}attn1.")
            yield from same(*(norm + stream for norm in norms), name=f"{block}attn1.", bias=False)
        for expert in _EXPERTS:
            yield from same("w1", "w2", "w3", name=f"{block}ff_i.{expert}.", bias=False)
        if len(streams) > 1:
            yield from same("w1", "w2", "w3", name=f"{block}ff_t.", bias=False)


_HIDREAM = Family(
    name="hidream",
    title="HiDream",
    parts=(
        TRANSFORMER(
            anchor="double_stream_blocks.{}.block.attn1.to_q",
            build=hidream,
            depths={"caption_projection": 49, "double_stream_blocks": 16, "single_stream_blocks": 32},
        ),
        CLIP_L(anchor=_TOKENS, build=partial(clip, 768, projected=True, positions=None), general=True),
        CLIP_G(anchor=_TOKENS, build=partial(clip, 1280, projected=True, positions=None), general=True),
        T5(name="text_encoder_3", webui=("lora_te3",), general=True),
        language_encoder("llama", 32, "text_encoder_4", ("lora_te4",)),
    ),
    reads={**READS, "comfyui": ("ldm", "kohya", "diffusers", "lycoris")},
    published="2025-04",
    base_model_version="hidream",
    architecture="hidream-i1",
    implementation="https://github.com/HiDream-ai/HiDream-I1",
    resolution="1024x1024",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_HIDREAM,)
