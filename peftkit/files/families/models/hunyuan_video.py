"""HunyuanVideo and Framepack: HunyuanVideoTransformer3DModel, 20 joint blocks and 40 single ones.

Sources: the class and the single-file loader of diffusers; ComfyUI's renames of the official checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import CLIP_L, language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, entry, fused, renamed
from peftkit.files.families.transformer import ENCODERS_UNREAD, IMAGE, TEXT, TRAINED_BY_KOHYA, TRANSFORMER

#: the official names -> those of the model in ComfyUI
_COMFY = {
    "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "_attn_q_norm.weight": "_attn.norm.query_norm.scale",
    "_attn_k_norm.weight": "_attn.norm.key_norm.scale",
    "_attn_q_norm": "_attn.norm.query_norm",
    "_attn_k_norm": "_attn.norm.key_norm",
    ".q_norm.weight": ".norm.query_norm.scale",
    ".k_norm.weight": ".norm.key_norm.scale",
    ".q_norm": ".norm.query_norm",
    ".k_norm": ".norm.key_norm",
}
_REFINER = "context_embedder.token_refiner.refiner_blocks"


def hunyuan_video() -> Iterator[ModuleSpec]:
    """Yield the modules of HunyuanVideoTransformer3DModel."""
    yield from renamed({"x_embedder.proj": "img_in.proj"})
    yield from _text()
    for ours, theirs in (("timestep", "time_in"), ("guidance", "guidance_in")):
        layers = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
        yield from renamed(layers, f"time_text_embed.{ours}_embedder.", f"{theirs}.", optional=ours == "guidance")
    yield from renamed(
        {"linear_1": "in_layer", "linear_2": "out_layer"}, "time_text_embed.text_embedder.", "vector_in."
    )
    yield from _joint()
    yield from _single()
    yield entry("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=True)
    yield from renamed({"proj_out": "final_layer.linear"})


def _text() -> Iterator[ModuleSpec]:
    """The refiner of the text's tokens."""
    layers = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
    yield from renamed(layers, "context_embedder.time_text_embed.timestep_embedder.", "txt_in.t_embedder.")
    for i in (1, 2):
        name = f"context_embedder.time_text_embed.text_embedder.linear_{i}"
        yield entry(name, f"txt_in.c_embedder.linear_{i}")
    yield from renamed({"context_embedder.proj_in": "txt_in.input_embedder"})
    original = "txt_in.individual_token_refiner.blocks.{}."
    yield from fused({f"{_REFINER}.{{}}.attn.to_{part}": 1 for part in "qkv"}, f"{original}self_attn_qkv")
    block = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.to_out.0": "self_attn_proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
        "norm_out.linear": "adaLN_modulation.1",
    }
    yield from renamed(block, f"{_REFINER}.{{}}.", original)


def _joint() -> Iterator[ModuleSpec]:
    """A block with a stream of the image and one of the text."""
    for ours, theirs in ((IMAGE, "img"), (TEXT, "txt")):
        name, original = "transformer_blocks.{}.", f"double_blocks.{{}}.{theirs}"
        yield from fused({name + part: 1 for part in ours.qkv}, f"{original}_attn_qkv")
        block = {ours.modulation: "mod.linear", ours.out: "attn_proj", ours.up: "mlp.fc1", ours.down: "mlp.fc2"}
        yield from renamed(block, name, f"{original}_")
        norms = dict(zip(ours.norms, ("attn_q_norm", "attn_k_norm"), strict=True))
        yield from renamed(norms, name, f"{original}_", bias=False)


def _single() -> Iterator[ModuleSpec]:
    """A block with one stream."""
    name, original = "single_transformer_blocks.{}.", "single_blocks.{}."
    yield from fused({**{f"{name}attn.to_{part}": 1 for part in "qkv"}, f"{name}proj_mlp": 4}, f"{original}linear1")
    yield from renamed({"norm.linear": "modulation.linear", "proj_out": "linear2"}, name, original)
    yield from renamed({"attn.norm_q": "q_norm", "attn.norm_k": "k_norm"}, name, original, bias=False)


_HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    title="HunyuanVideo",
    parts=(
        TRANSFORMER(
            build=hunyuan_video,
            depths={_REFINER: 2, "transformer_blocks": 20, "single_transformer_blocks": 40},
            prefixes=("model.model.",),
            respelled=_COMFY,
        ),
        language_encoder("llama", 32),
        CLIP_L(name="text_encoder_2", webui=("lora_te2", "lora_te1", "lora_te"), general=True),
    ),
    reads={**TRAINED_BY_KOHYA, "comfyui": ("ldm",)},
    published="2024-12",
    base_model_version="hunyuan_video",
    architecture="hunyuan-video",
    implementation="https://github.com/Tencent/HunyuanVideo",
    resolution="1280x720",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_HUNYUAN_VIDEO,)
