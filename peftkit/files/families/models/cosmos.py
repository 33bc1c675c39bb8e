"""Cosmos-Predict2 and Anima: CosmosTransformer3DModel.

Source: the class and the single-file loader of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import Component, ModuleSpec, renamed, same
from peftkit.files.families.transformer import ENCODERS_UNREAD, TRAINED_BY_KOHYA, TRANSFORMER

_ATTENTION = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}


def cosmos() -> Iterator[ModuleSpec]:
    """Yield the modules of CosmosTransformer3DModel."""
    outer = {
        "patch_embed.proj": "x_embedder.proj.1",
        "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
        "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
        "time_embed.norm": "t_embedding_norm",
        "norm_out.linear_1": "final_layer.adaln_modulation.1",
        "norm_out.linear_2": "final_layer.adaln_modulation.2",
        "proj_out": "final_layer.linear",
    }
    yield from renamed(outer, bias=False)
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        yield from renamed(_ATTENTION, f"transformer_blocks.{{}}.{ours}.", f"blocks.{{}}.{theirs}.", bias=False)
    for ours, theirs in (("norm1", "self_attn"), ("norm2", "cross_attn"), ("norm3", "mlp")):
        layers = {"linear_1": "1", "linear_2": "2"}
        name, original = f"transformer_blocks.{{}}.{ours}.", f"blocks.{{}}.adaln_modulation_{theirs}."
        yield from renamed(layers, name, original, bias=False)
    feed = {"ff.net.0.proj": "mlp.layer1", "ff.net.2": "mlp.layer2"}
    yield from renamed(feed, "transformer_blocks.{}.", "blocks.{}.", bias=False)


def conditioner() -> Iterator[ModuleSpec]:
    """Yield the modules of AnimaTextConditioner, through which Anima reads its text."""
    yield from same("embed", "norm", bias=False)
    yield from same("out_proj", "blocks.{}.mlp.0", "blocks.{}.mlp.2")
    for attention in ("self_attn", "cross_attn"):
        layers = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        yield from same(*layers, name=f"blocks.{{}}.{attention}.", bias=False)
    yield from same("norm_self_attn", "norm_cross_attn", "norm_mlp", name="blocks.{}.", bias=False)


_COSMOS = Family(
    name="cosmos",
    title="Cosmos-Predict2 or Anima",
    parts=(
        TRANSFORMER(
            anchor="transformer_blocks.{}.attn1.to_q",
            build=cosmos,
            depths={"transformer_blocks": 36},
            prefixes=("net.",),
        ),
        Component(
            name="text_conditioner",
            original="net.llm_adapter.",
            comfy="diffusion_model.llm_adapter",
            webui=("lora_unet_llm_adapter",),
            anchor="blocks.{}.cross_attn.q_proj",
            build=conditioner,
            depths={"blocks": 6},
            prefixes=("model.diffusion_model.llm_adapter.", "llm_adapter."),
            general=True,
        ),
        language_encoder("qwen3_06b", 28, normed=True),
    ),
    reads=TRAINED_BY_KOHYA,
    published="2025-06",
    base_model_version="cosmos_predict2",
    architecture="cosmos-predict2",
    implementation="https://github.com/nvidia-cosmos/cosmos-predict2",
    resolution="1024x1024",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_COSMOS,)
