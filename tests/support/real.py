"""Tiny models of the real classes, with the modules' true names: four levels of a U-Net, two layers of CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

with torch.device("meta"):
    torch.empty(0)  # torch remembers its constructors at the first use: here, before a fixture wraps torch.empty

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel


def sd15_unet() -> nn.Module:
    """The U-Net of Stable Diffusion 1.5, every module of it, eight channels wide."""
    sizes = {"norm_num_groups": 2, "attention_head_dim": 2, "cross_attention_dim": 8, "sample_size": 8}
    return UNet2DConditionModel(block_out_channels=(8, 8, 8, 8), **sizes).eval()


def clip_text_model() -> nn.Module:
    """Its text encoder, with two layers."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, **ids, projection_dim=8)).eval()


def stable_diffusion() -> Any:
    """The pipeline of both, the same one every time."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=clip_text_model(),
        tokenizer=None,
        unet=sd15_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
