"""Wan 2.1 and 2.2: WanTransformer3DModel, of which Wan 2.2 14B has two, one for each range of noise.

Sources: the class and the single-file loader of diffusers, the Wan2.1 and Wan2.2 repositories.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from peftkit.files.families.encoders import ONLY_T5, t5
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, entry, fused, renamed, same
from peftkit.files.families.transformer import ENCODERS_UNREAD, TRAINED_BY_KOHYA, TRANSFORMER

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_NORMS = {"norm_q": "norm_q", "norm_k": "norm_k"}


def wan() -> Iterator[ModuleSpec]:
    """Yield the modules of WanTransformer3DModel, and those that VACE and Animate have beside them."""
    yield from same("patch_embedding")
    embedders = {
        "time_embedder.linear_1": "time_embedding.0",
        "time_embedder.linear_2": "time_embedding.2",
        "time_proj": "time_projection.1",
        "text_embedder.linear_1": "text_embedding.0",
        "text_embedder.linear_2": "text_embedding.2",
    }
    yield from renamed(embedders, "condition_embedder.")
    image = {"norm1": "0", "ff.net.0.proj": "1", "ff.net.2": "3", "norm2": "4"}  # of Wan 2.1's image to video
    yield from renamed(image, "condition_embedder.image_embedder.", "img_emb.proj.", optional=True)
    yield from _block("blocks.{}.")
    yield from renamed({"proj_out": "head.head"})
    yield from _vace()
    yield from _animate()


def _block(block: str, optional: bool = False) -> Iterator[ModuleSpec]:
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        name, original = f"{block}{ours}.", f"{block}{theirs}."
        yield from renamed(_ATTENTION, name, original, optional=optional)
        yield from renamed(_NORMS, name, original, bias=False, optional=optional)
    name, original = f"{block}attn2.", f"{block}cross_attn."
    yield from renamed({"add_k_proj": "k_img", "add_v_proj": "v_img"}, name, original, optional=True)
    yield from renamed({"norm_added_k": "norm_k_img"}, name, original, bias=False, optional=True)
    # norm1 and norm3 of the class, norm1 and norm2 of the original, have no weights
    rest = {"norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    yield from renamed(rest, block, block, optional=optional)


def _vace() -> Iterator[ModuleSpec]:
    """The blocks that read the video to edit; the first has a layer before it."""
    yield from same("vace_patch_embedding", optional=True)
    yield entry("vace_blocks.0.proj_in", "vace_blocks.0.before_proj", optional=True)
    yield from _block("vace_blocks.{}.", optional=True)
    yield entry("vace_blocks.{}.proj_out", "vace_blocks.{}.after_proj", optional=True)


def _animate() -> Iterator[ModuleSpec]:
    """The pose's embedding, the face's, and where the face enters; not the encoder of motion, which stays as it is."""
    yield from same("pose_patch_embedding", "face_encoder.out_proj", optional=True)
    convolutions = {"conv1_local": "conv1_local.conv", "conv2": "conv2.conv", "conv3": "conv3.conv"}
    yield from renamed(convolutions, "face_encoder.", "face_encoder.", optional=True)
    name, original = "face_adapter.{}.", "face_adapter.fuser_blocks.{}."
    yield from renamed({"to_q": "linear1_q", "to_out": "linear2"}, name, original, optional=True)
    yield from fused({f"{name}to_k": 1, f"{name}to_v": 1}, f"{original}linear1_kv", optional=True)
    yield from renamed({"norm_q": "q_norm", "norm_k": "k_norm"}, name, original, bias=False, optional=True)


_WAN = Family(
    name="wan",
    title="Wan 2.1 or 2.2",
    parts=(
        TRANSFORMER(
            anchor="blocks.{}.attn1.to_q",
            build=wan,
            depths={"blocks": 40, "vace_blocks": 8, "face_adapter": 8},
        ),
        ONLY_T5(
            original="text_encoders.umt5xxl.transformer.",
            comfy="text_encoders.umt5xxl.transformer",
            webui=("lora_te", "lora_te1"),
            build=partial(t5, sized=False, own_biases=True),
        ),
    ),
    reads=TRAINED_BY_KOHYA,
    published="2025-02",
    base_model_version="wan",
    architecture="wan",
    implementation="https://github.com/Wan-Video/Wan2.1",
    resolution="832x480",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_WAN,)
