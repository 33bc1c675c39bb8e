"""Names of the Flux and SD3 transformers: diffusers, and the model's own with its fused projections."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a diffusers module lies in the model's own layout: `part` of `parts` row blocks of `module`.

    `swapped`: the two halves of its rows (scale, shift) are in the other order.
    """

    module: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


def _fused(module: str, *names: str) -> dict[str, Place]:
    return {name: Place(module, part, len(names)) for part, name in enumerate(names)}


def _single(names: dict[str, str]) -> dict[str, Place]:
    return {name: Place(module) for name, module in names.items()}


# {} is the number of the block
FLUX = {
    **_fused(
        "double_blocks.{}.img_attn.qkv",
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ),
    **_fused(
        "double_blocks.{}.txt_attn.qkv",
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ),
    **_fused(
        "single_blocks.{}.linear1",
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.proj_mlp",
    ),
    **_single(
        {
            "transformer_blocks.{}.attn.to_out.0": "double_blocks.{}.img_attn.proj",
            "transformer_blocks.{}.attn.to_add_out": "double_blocks.{}.txt_attn.proj",
            "transformer_blocks.{}.ff.net.0.proj": "double_blocks.{}.img_mlp.0",
            "transformer_blocks.{}.ff.net.2": "double_blocks.{}.img_mlp.2",
            "transformer_blocks.{}.ff_context.net.0.proj": "double_blocks.{}.txt_mlp.0",
            "transformer_blocks.{}.ff_context.net.2": "double_blocks.{}.txt_mlp.2",
            "transformer_blocks.{}.norm1.linear": "double_blocks.{}.img_mod.lin",
            "transformer_blocks.{}.norm1_context.linear": "double_blocks.{}.txt_mod.lin",
            "single_transformer_blocks.{}.proj_out": "single_blocks.{}.linear2",
            "single_transformer_blocks.{}.norm.linear": "single_blocks.{}.modulation.lin",
            "x_embedder": "img_in",
            "context_embedder": "txt_in",
            "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
            "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
            "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
            "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
            "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
            "proj_out": "final_layer.linear",
        }
    ),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
}
SD3 = {
    **_fused(
        "joint_blocks.{}.x_block.attn.qkv",
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ),
    **_fused(
        "joint_blocks.{}.context_block.attn.qkv",
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ),
    **_fused(
        "joint_blocks.{}.x_block.attn2.qkv",
        "transformer_blocks.{}.attn2.to_q",
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
    ),
    **_single(
        {
            "transformer_blocks.{}.attn.to_out.0": "joint_blocks.{}.x_block.attn.proj",
            "transformer_blocks.{}.attn.to_add_out": "joint_blocks.{}.context_block.attn.proj",
            "transformer_blocks.{}.attn2.to_out.0": "joint_blocks.{}.x_block.attn2.proj",
            "transformer_blocks.{}.ff.net.0.proj": "joint_blocks.{}.x_block.mlp.fc1",
            "transformer_blocks.{}.ff.net.2": "joint_blocks.{}.x_block.mlp.fc2",
            "transformer_blocks.{}.ff_context.net.0.proj": "joint_blocks.{}.context_block.mlp.fc1",
            "transformer_blocks.{}.ff_context.net.2": "joint_blocks.{}.context_block.mlp.fc2",
            "transformer_blocks.{}.norm1.linear": "joint_blocks.{}.x_block.adaLN_modulation.1",
            "transformer_blocks.{}.norm1_context.linear": "joint_blocks.{}.context_block.adaLN_modulation.1",
            "pos_embed.proj": "x_embedder.proj",
            "context_embedder": "context_embedder",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
            "proj_out": "final_layer.linear",
        }
    ),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
}
TABLES = {"flux": FLUX, "sd3": SD3}
_NORM = re.compile(r"\.norm_(added_)?[qk]$")
_NUMBER = re.compile(r"(?<=blocks\.)\d+")


def place(path: str, family: str, shape: tuple[int, ...] = ()) -> Place | None:
    """Where the diffusers module `path` lies in the model's own layout; None for the norms inside attention.

    The last block of SD3 modulates its text by a scale and a shift alone, and diffusers has these the other way.
    """
    if _NORM.search(path):
        return None
    number = _NUMBER.search(path)
    found = TABLES[family].get(_NUMBER.sub("{}", path, count=1))
    if found is None:
        raise ValueError(f"{path} is no module of {family} in diffusers' names")
    ends = path.endswith(".norm1_context.linear") and len(shape) == 2 and shape[0] == 2 * shape[1]
    return Place(found.module.format(number[0] if number else ""), found.part, found.parts, found.swapped or ends)
