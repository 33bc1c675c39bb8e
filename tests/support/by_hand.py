"""Adapters of a few numbers, whose ΔW is computed by hand, for the tests of the readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.files import keyed, write
from tests.support.readers import READERS

TOLERANCE = 1e-5


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    return write(folder / "adapter.safetensors", tensors, metadata)


def t(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def near(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() < tolerance)


LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
POINT = "unet.down_blocks.0.attentions.0.proj_in"
CONV = "unet.down_blocks.0.resnets.0.conv1"


def kohya_key(name: str) -> str:
    """lora_unet_ or lora_te_ and the path, the name every loader takes for SD1.5."""
    component, _, path = name.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + path.replace(".", "_")


UP, DOWN = t([1.0], [2.0]), t([3.0, 4.0])
PRODUCT = t([3.0, 4.0], [6.0, 8.0])
BASE = t([3.0, 0.0], [0.0, 4.0])
LORA = {"lora_up.weight": UP, "lora_down.weight": DOWN}


def unet_paths(family: str) -> list[str]:
    """Every module with a weight of the real U-Net, in diffusers' names."""
    depth = {"sd15": ((1, 1, 1, 0), 1, (0, 1, 1, 1)), "sdxl": ((0, 2, 10), 10, (10, 2, 0))}[family]
    cross = ("to_q", "to_k", "to_v", "to_out.0")

    def attention(name: str, layers: int) -> list[str]:
        inner = [f"attn{n}.{part}" for n in (1, 2) for part in cross]
        inner += ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
        blocks = [f"{name}.transformer_blocks.{n}.{part}" for n in range(layers) for part in inner]
        return [f"{name}.norm", f"{name}.proj_in", f"{name}.proj_out", *blocks]

    def resnet(name: str, shortcut: bool) -> list[str]:
        parts = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2", *(["conv_shortcut"] if shortcut else [])]
        return [f"{name}.{part}" for part in parts]

    paths = ["conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
    paths += ["add_embedding.linear_1", "add_embedding.linear_2"] if family == "sdxl" else []
    last = len(depth[0]) - 1
    for block, layers in enumerate(depth[0]):
        for n in range(2):
            paths += resnet(f"down_blocks.{block}.resnets.{n}", n == 0 and block in (1, 2))
            paths += attention(f"down_blocks.{block}.attentions.{n}", layers) if layers else []
        paths += [f"down_blocks.{block}.downsamplers.0.conv"] if block != last else []
    paths += resnet("mid_block.resnets.0", False) + resnet("mid_block.resnets.1", False)
    paths += attention("mid_block.attentions.0", depth[1])
    for block, layers in enumerate(depth[2]):
        for n in range(3):
            paths += resnet(f"up_blocks.{block}.resnets.{n}", True)
            paths += attention(f"up_blocks.{block}.attentions.{n}", layers) if layers else []
        paths += [f"up_blocks.{block}.upsamplers.0.conv"] if block != last else []
    return paths


def found(loader: str, names: Iterable[str], family: str, path: Path) -> set[str]:
    """The modules a loader finds of a file that names `names`[i] for the i-th weight; norms have LoRA here, too."""
    names = dict(zip(unet_paths(family), names, strict=True))
    tensors = {
        key: tensor
        for name in names.values()
        for key, tensor in keyed(name, {"lora_up.weight": UP, "lora_down.weight": DOWN, "alpha": torch.ones(1)}).items()
    }
    weights = {f"unet.{path}": BASE for path in names}
    outcome = READERS[loader](write_adapter(path, tensors), weights, family)
    return {name.removeprefix("unet.") for name in outcome.deltas}
