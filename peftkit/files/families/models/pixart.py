"""PixArt-alpha and PixArt-Sigma: PixArtTransformer2DModel.

Sources: the class and the conversion script of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import ONLY_T5
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, fused, renamed
from peftkit.files.families.transformer import TRANSFORMER

_ADALN = "adaln_single.emb."


def pixart() -> Iterator[ModuleSpec]:
    """Yield the modules of PixArtTransformer2DModel; Sigma embeds neither resolution nor aspect ratio."""
    yield from renamed(
        {"pos_embed.proj": "x_embedder.proj", "adaln_single.linear": "t_block.1", "proj_out": "final_layer.linear"}
    )
    for ours, theirs in (("timestep", "t"), ("resolution", "csize"), ("aspect_ratio", "ar")):
        layers = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
        yield from renamed(layers, f"{_ADALN}{ours}_embedder.", f"{theirs}_embedder.", optional=ours != "timestep")
    captions = {"linear_1": "fc1", "linear_2": "fc2"}
    yield from renamed(captions, "caption_projection.", "y_embedder.y_proj.", optional=True)
    name, original = "transformer_blocks.{}.", "blocks.{}."
    yield from fused({f"{name}attn1.to_{part}": 1 for part in "qkv"}, f"{original}attn.qkv")
    yield from fused({f"{name}attn2.to_{part}": 1 for part in "kv"}, f"{original}cross_attn.kv_linear")
    block = {
        "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.to_out.0": "cross_attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
    }
    yield from renamed(block, name, original)


_PIXART = Family(
    name="pixart",
    title="PixArt",
    parts=(
        TRANSFORMER(anchor="transformer_blocks.{}.attn1.to_q", build=pixart, depths={"transformer_blocks": 28}),
        ONLY_T5(),
    ),
    reads={
        "comfyui": ("ldm", "kohya", "diffusers"),
        "lycoris": ("lycoris",),
        "peft": ("peft",),
    },
    published="2023-10",
    base_model_version="pixart",
    architecture="pixart",
    implementation="https://github.com/PixArt-alpha/PixArt-sigma",
    resolution="1024x1024",
)

FAMILIES = (_PIXART,)
