"""AuraFlow: AuraFlowTransformer2DModel.

Source: the class and the single-file loader of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from peftkit.files.families.encoders import ONLY_T5, t5
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, entry, renamed
from peftkit.files.families.transformer import ENCODERS_UNREAD, READS, TRANSFORMER

_FEED = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}


def auraflow() -> Iterator[ModuleSpec]:
    """Yield the modules of AuraFlowTransformer2DModel."""
    outer = {
        "pos_embed.proj": "init_x_linear",
        "time_step_proj.linear_1": "t_embedder.mlp.0",
        "time_step_proj.linear_2": "t_embedder.mlp.2",
    }
    yield from renamed(outer)
    yield from renamed({"context_embedder": "cond_seq_linear", "proj_out": "final_linear"}, bias=False)
    yield entry("norm_out.linear", "modF.1", bias=False, swapped=True)
    name, original = "joint_transformer_blocks.{}.", "double_layers.{}."
    image = {"to_q": "w2q", "to_k": "w2k", "to_v": "w2v", "to_out.0": "w2o"}
    text = {"add_q_proj": "w1q", "add_k_proj": "w1k", "add_v_proj": "w1v", "to_add_out": "w1o"}
    yield from renamed({**image, **text}, f"{name}attn.", f"{original}attn.", bias=False)
    for modulation, feed, kind in (("norm1", "ff", "X"), ("norm1_context", "ff_context", "C")):
        yield entry(f"{name}{modulation}.linear", f"{original}mod{kind}.1", bias=False)
        yield from renamed(_FEED, f"{name}{feed}.", f"{original}mlp{kind}.", bias=False)
    name, original = "single_transformer_blocks.{}.", "single_layers.{}."
    attention = {"to_q": "w1q", "to_k": "w1k", "to_v": "w1v", "to_out.0": "w1o"}
    yield from renamed(attention, f"{name}attn.", f"{original}attn.", bias=False)
    yield entry(f"{name}norm1.linear", f"{original}modCX.1", bias=False)
    yield from renamed(_FEED, f"{name}ff.", f"{original}mlp.", bias=False)


_AURAFLOW = Family(
    name="auraflow",
    title="AuraFlow",
    parts=(
        TRANSFORMER(
            anchor="joint_transformer_blocks.{}.attn.to_q",
            build=auraflow,
            depths={"joint_transformer_blocks": 4, "single_transformer_blocks": 32},
        ),
        ONLY_T5(
            original="text_encoders.pile_t5xl.transformer.",
            comfy="text_encoders.pile_t5xl.transformer",
            webui=("lora_te", "lora_te1"),
            build=partial(t5, sized=False, own_biases=True),
        ),
    ),
    reads={**READS, "comfyui": ("ldm", "kohya", "diffusers")},
    published="2024-07",
    base_model_version="auraflow",
    architecture="auraflow",
    implementation="https://github.com/cloneofsimo/minRF",
    resolution="1024x1024",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_AURAFLOW,)
