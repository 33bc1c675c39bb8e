"""Names of SD1.5, SD2 and SDXL U-Nets: diffusers and ldm."""

from __future__ import annotations

import re

UNETS = ("sd15", "sd2", "sdxl")

_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# blocks of the decoder that have no attention, so that the upsampler is the second of its block
_BARE_UP = {"sd15": (0,), "sd2": (0,), "sdxl": (2,)}
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def to_ldm(path: str, family: str) -> str:
    """The ldm name of a diffusers module, e.g. down_blocks.0.attentions.0.proj_in -> input_blocks.1.1.proj_in."""
    if path in _TOP:
        return _TOP[path]
    if match := _MIDDLE.fullmatch(path):
        kind, index, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{_inner(kind, rest)}"
    match = _BLOCK.fullmatch(path)
    if match is None:
        raise ValueError(f"{path} is no module of a U-Net in diffusers' names")
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 + 3 * block}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{1 if block in _BARE_UP[family] else 2}.conv"
    column = 1 if kind == "attentions" else 0
    if side == "down_blocks":
        return f"input_blocks.{1 + 3 * block + index}.{column}.{_inner(kind, rest)}"
    return f"output_blocks.{3 * block + index}.{column}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return _RESNET[rest] if kind == "resnets" else rest
