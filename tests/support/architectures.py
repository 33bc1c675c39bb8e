"""Small layers under the names of every model family, and what an exported file holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.cells import TARGETS, wrapped
from tests.support.readers import kohya

EACH_TARGET = pytest.mark.parametrize("target", TARGETS)


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors" if path.is_dir() else path)


def linear(outputs: int, inputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs)


def conv(outputs: int, inputs: int, kernel: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(inputs, outputs, kernel)


Layers = dict[str, Callable[[], nn.Module]]


def _attention(at: str, proj: Callable[[], nn.Module]) -> Layers:
    block = f"{at}.transformer_blocks.0"
    return {
        f"{at}.proj_in": proj,
        **{f"{block}.attn1.{part}": linear(8, 8) for part in ("to_q", "to_k", "to_v", "to_out.0")},
        f"{block}.attn2.to_k": linear(8, 4),
        f"{block}.ff.net.0.proj": linear(16, 8),
        f"{block}.ff.net.2": linear(8, 16),
    }


def _unet(proj: Callable[[], nn.Module], last_down: int, **more: Callable[[], nn.Module]) -> Layers:
    """Of every kind of module of the U-Net of SD one, and every sampler."""
    samplers = [f"down_blocks.{i}.downsamplers.0.conv" for i in range(last_down)]
    samplers += [f"up_blocks.{i}.upsamplers.0.conv" for i in range(last_down)]
    return {
        "conv_in": conv(8, 4, 3),
        "conv_out": conv(4, 8, 3),
        "time_embedding.linear_1": linear(8, 4),
        "time_embedding.linear_2": linear(8, 8),
        "down_blocks.1.resnets.0.conv1": conv(8, 4, 3),
        "down_blocks.1.resnets.0.time_emb_proj": linear(8, 8),
        "down_blocks.1.resnets.0.conv_shortcut": conv(8, 4, 1),
        "mid_block.resnets.1.conv2": conv(8, 8, 3),
        "up_blocks.0.resnets.2.conv_shortcut": conv(8, 16, 1),
        **{name: conv(8, 8, 3) for name in samplers},
        **_attention("down_blocks.1.attentions.1", proj),
        **_attention("mid_block.attentions.0", proj),
        **_attention("up_blocks.1.attentions.2", proj),
        **{name.replace("__", "."): make for name, make in more.items()},
    }


def clip(*layers: int, level: str = "text_model.") -> Layers:
    parts = {f"self_attn.{part}_proj": linear(8, 8) for part in ("q", "k", "v", "out")}
    parts |= {"mlp.fc1": linear(16, 8), "mlp.fc2": linear(8, 16)}
    return {f"{level}encoder.layers.{i}.{part}": make for i in layers for part, make in parts.items()}


T5: Layers = {
    "encoder.block.0.layer.0.SelfAttention.q": linear(8, 8),
    "encoder.block.23.layer.0.SelfAttention.o": linear(8, 8),
    "encoder.block.23.layer.1.DenseReluDense.wi_0": linear(16, 8),
    "encoder.block.23.layer.1.DenseReluDense.wo": linear(8, 16),
}
_JOINT: Layers = {
    **{f"transformer_blocks.3.attn.{part}": linear(8, 8) for part in ("to_q", "to_k", "to_v")},
    **{f"transformer_blocks.3.attn.add_{part}_proj": linear(8, 8) for part in "qkv"},
    "transformer_blocks.3.attn.to_out.0": linear(8, 8),
    "transformer_blocks.3.attn.to_add_out": linear(8, 8),
    "transformer_blocks.3.ff.net.0.proj": linear(32, 8),
    "transformer_blocks.3.ff.net.2": linear(8, 32),
    "transformer_blocks.3.ff_context.net.0.proj": linear(32, 8),
    "transformer_blocks.3.norm1.linear": linear(48, 8),
    "transformer_blocks.3.norm1_context.linear": linear(48, 8),
    "time_text_embed.timestep_embedder.linear_1": linear(8, 4),
    "time_text_embed.text_embedder.linear_2": linear(8, 8),
    "context_embedder": linear(8, 16),
    "norm_out.linear": linear(16, 8),  # its halves are in the other order in the original network
    "proj_out": linear(4, 8),
}
SD3: Layers = {**_JOINT, "pos_embed.proj": conv(8, 4, 2)}
SD35: Layers = {**SD3, **{f"transformer_blocks.3.attn2.{part}": linear(8, 8) for part in ("to_q", "to_k", "to_v")}}
FLUX: Layers = {
    **_JOINT,
    **{f"single_transformer_blocks.37.attn.{part}": linear(8, 8) for part in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.37.proj_mlp": linear(32, 8),
    "single_transformer_blocks.37.proj_out": linear(8, 40),
    "single_transformer_blocks.37.norm.linear": linear(24, 8),
    "time_text_embed.guidance_embedder.linear_2": linear(8, 8),
    "x_embedder": linear(8, 4),
}
SDXL_UNET = _unet(linear(8, 8), 2, add_embedding__linear_1=linear(8, 12), add_embedding__linear_2=linear(8, 8))

PARTS: dict[tuple[str, str], Layers] = {
    ("sd15", "unet"): _unet(conv(8, 8, 1), 3),
    ("sd15", "text_encoder"): clip(0, 11),
    ("sd2", "unet"): _unet(linear(8, 8), 3),
    ("sd2", "text_encoder"): clip(0, 22),
    ("sdxl", "unet"): SDXL_UNET,
    ("sdxl", "text_encoder"): clip(0, 11),
    ("sdxl", "text_encoder_2"): clip(0, 31),
    ("sd3", "transformer"): SD3,
    ("sd3", "text_encoder"): clip(0, 11),
    ("sd3", "text_encoder_2"): clip(0, 31),
    ("sd3", "text_encoder_3"): T5,
    ("sd35-medium", "transformer"): SD35,
    ("flux", "transformer"): FLUX,
    ("flux", "text_encoder"): clip(0, 11),
    ("flux", "text_encoder_2"): T5,
}


def readable(family: str, component: str, target: str) -> bool:
    """A1111 loads no Flux, and SD3 under names of another kind; diffusers puts nothing on a T5."""
    if target == "a1111":
        return family in ("sd15", "sd2", "sdxl")
    t5 = PARTS[family, component] is T5
    return not (target == "diffusers" and t5)


def looked_for(family: str, component: str, target: str) -> Layers:
    """The layers of a part of which the program reads adapters: sd-scripts not of those outside its blocks."""
    known = {"sd35-medium": "sd3"}.get(family, family)
    layers = PARTS[family, component]
    return {path: m for path, m in layers.items() if target != "kohya" or kohya.made(f"{component}.{path}", known)}


def of_part(family: str, component: str, adapter: str, target: str) -> nn.Module:
    return _of_part(family, component, adapter, target == "kohya")


@cache
def _of_part(family: str, component: str, adapter: str, blocks: bool) -> nn.Module:
    return wrapped(adapter, looked_for(family, component, "kohya" if blocks else ""))


def outputs(unet: Any, text_encoder: Any) -> tuple[Tensor, Tensor]:
    """Of the text encoder, and of the U-Net given its states."""
    torch.manual_seed(3)
    x, ids = torch.randn(1, 4, 8, 8), torch.tensor([[0, 3, 7, 1]])
    states = text_encoder(ids).last_hidden_state
    return states, unet(x, torch.tensor([37]), states).sample
