"""Wan 2.1 and 2.2: WanTransformer3DModel, of which Wan 2.2 14B has two, one for each range of noise.

Sources: the class and the single-file loader of diffusers, the Wan2.1 and Wan2.2 repositories.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, renamed, same
from peftkit.files.families.transformer import TRAINED_BY_KOHYA, TRANSFORMER


def wan() -> Iterator[ModuleSpec]:
    """Yield the modules of WanTransformer3DModel; the image embedder is that of Wan 2.1's image to video."""
    yield from same("patch_embedding")
    embedders = {
        "time_embedder.linear_1": "time_embedding.0",
        "time_embedder.linear_2": "time_embedding.2",
        "time_proj": "time_projection.1",
        "text_embedder.linear_1": "text_embedding.0",
        "text_embedder.linear_2": "text_embedding.2",
    }
    yield from renamed(embedders, "condition_embedder.")
    image = {"norm1": "0", "ff.net.0.proj": "1", "ff.net.2": "3", "norm2": "4"}
    yield from renamed(image, "condition_embedder.image_embedder.", "img_emb.proj.", optional=True)
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    norms = {"norm_q": "norm_q", "norm_k": "norm_k"}
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        yield from renamed(attention, f"blocks.{{}}.{ours}.", f"blocks.{{}}.{theirs}.")
        yield from renamed(norms, f"blocks.{{}}.{ours}.", f"blocks.{{}}.{theirs}.", bias=False)
    added = {"add_k_proj": "k_img", "add_v_proj": "v_img"}
    yield from renamed(added, "blocks.{}.attn2.", "blocks.{}.cross_attn.", optional=True)
    norm = {"norm_added_k": "norm_k_img"}
    yield from renamed(norm, "blocks.{}.attn2.", "blocks.{}.cross_attn.", bias=False, optional=True)
    # norm1 and norm3 of the class, norm1 and norm2 of the original, have no weights
    yield from renamed({"norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}, "blocks.{}.", "blocks.{}.")
    yield from renamed({"proj_out": "head.head"})


_WAN = Family(
    name="wan",
    title="Wan 2.1 or 2.2",
    parts=(TRANSFORMER(anchor="blocks.{}.attn1.to_q", build=wan, depths={"blocks": 40}),),
    reads=TRAINED_BY_KOHYA,
    published="2025-02",
    base_model_version="wan",
    architecture="wan",
    implementation="https://github.com/Wan-Video/Wan2.1",
    resolution="832x480",
)

FAMILIES = (_WAN,)
