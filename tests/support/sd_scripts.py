"""A run of sd-scripts in small: the calls that its training loop makes of a network, and models as it builds them.

The order and the arguments of the calls are those of train_network.py (48d368fa); the models have the names of modules
and the classes that its own networks have, by which it chooses layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        mixed = torch.softmax(self.to_q(x) @ self.to_k(context).mT, -1) @ self.to_v(context)
        return x + self.to_out[0](mixed)


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width), Attention(width, context)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.attn2(self.attn1(x, x), context)


class Transformer2DModel(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width, context)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(x.flatten(2).mT)
        return x + self.proj_out(self.transformer_blocks[0](tokens, context)).mT.unflatten(2, x.shape[2:])


class ResnetBlock2D(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(2, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        del context
        return x + self.in_layers(x)


class SdxlUNet2DConditionModel(nn.Module):
    """The names of SDXL's original network: blocks 4 and 5 go down, 1 is in the middle, 3 goes up."""

    def __init__(self, width: int = 8, context: int = 16) -> None:
        super().__init__()
        empty = [nn.ModuleList() for _ in range(4)]
        self.input_blocks = nn.ModuleList(
            [*empty, nn.ModuleList([ResnetBlock2D(width), Transformer2DModel(width, context)])]
        )
        self.middle_block = nn.ModuleList([ResnetBlock2D(width), Transformer2DModel(width, context)])
        self.output_blocks = nn.ModuleList(
            [*(nn.ModuleList() for _ in range(3)), nn.ModuleList([ResnetBlock2D(width)])]
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for layer in (*self.input_blocks[4], *self.middle_block, *self.output_blocks[3]):
            x = layer(x, context)
        return x


class DoubleStreamBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.img_attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.img_mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.img_attn["qkv"](x).chunk(3, -1)
        return x + self.img_mlp(self.img_attn["proj"](torch.softmax(q @ k.mT, -1) @ v))


class SingleStreamBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(torch.tanh(self.linear1(x)))


class Flux(nn.Module):
    def __init__(self, width: int = 8, context: int = 16) -> None:
        super().__init__()
        self.txt_in = nn.Linear(context, width)
        self.double_blocks = nn.ModuleList([DoubleStreamBlock(width)])
        self.single_blocks = nn.ModuleList([SingleStreamBlock(width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = x.flatten(2).mT + self.txt_in(context).mean(1, keepdim=True)
        return self.single_blocks[0](self.double_blocks[0](tokens)).mT.unflatten(2, x.shape[2:])


class T5EncoderModel(nn.Module):
    """A stand-in for T5, of which only the class's name matters here."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"block": nn.ModuleList([T5Attention(width)])})

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder["block"][0](nn.functional.one_hot(tokens % 16, 16).float())


class T5Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def clip(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CLIPTextModel(CLIPTextConfig(vocab_size=16, max_position_embeddings=8, **sizes, **ends))


@dataclass
class Run:
    """The arguments of sd-scripts that reach a network."""

    network_module: str = "peftkit.integrations.kohya"
    network_dim: int | None = 4
    network_alpha: float | None = 2
    network_args: Sequence[str] = ()
    network_weights: Path | None = None
    network_dropout: float | None = None
    dim_from_weights: bool = False
    base_weights: Sequence[Path] = ()
    train_text_encoder: bool = True
    train_unet: bool = True
    scale_weight_norms: float | None = None
    full_bf16: bool = False
    weight_dtype: torch.dtype = torch.float32
    text_encoder_lr: Any = 1e-2
    unet_lr: float = 1e-2
    learning_rate: float = 1e-2
    steps: int = 2
    output: Path | None = None
    metadata: dict[str, str] = field(default_factory=lambda: {"ss_network_dim": "4"})


def train(run: Run, text_encoders: Sequence[nn.Module], unet: nn.Module, loss: Callable[[], Tensor]) -> Any:
    """Train a network as train_network.py does; the network, with `descriptions` of its learning rates."""
    accelerator = Accelerator(cpu=True)
    text_encoder = text_encoders if len(text_encoders) > 1 else text_encoders[0]
    network_module = importlib.import_module(run.network_module)
    for path in run.base_weights:
        module, weights = network_module.create_network_from_weights(
            1.0, str(path), None, text_encoder, unet, for_inference=True
        )
        module.merge_to(text_encoder, unet, weights, run.weight_dtype, "cpu")
    kwargs: dict[str, Any] = dict(argument.split("=", 1) for argument in run.network_args)
    if run.dim_from_weights:
        network, _ = network_module.create_network_from_weights(
            1, str(run.network_weights), None, text_encoder, unet, **kwargs
        )
    else:
        kwargs.setdefault("dropout", run.network_dropout)
        network = network_module.create_network(
            1.0,
            run.network_dim,
            run.network_alpha,
            None,
            text_encoder,
            unet,
            neuron_dropout=run.network_dropout,
            **kwargs,
        )
    assert hasattr(network, "set_multiplier")
    if run.scale_weight_norms:
        assert hasattr(network, "apply_max_norm_regularization")
    network.apply_to(text_encoder, unet, run.train_text_encoder, run.train_unet)
    if run.network_weights is not None:
        assert network.load_weights(str(run.network_weights))
    network.enable_gradient_checkpointing()
    params, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(
        run.text_encoder_lr, run.unet_lr, run.learning_rate
    )
    optimizer = torch.optim.AdamW(params, lr=run.learning_rate, weight_decay=0)
    if run.full_bf16:
        network.to(run.weight_dtype)
    unet.requires_grad_(False)
    unet.to(dtype=run.weight_dtype)
    for encoder in text_encoders:
        encoder.requires_grad_(False)
        encoder.to(dtype=run.weight_dtype)
    network, optimizer = accelerator.prepare(network, optimizer)
    unet.eval()
    for encoder in text_encoders:
        encoder.eval()
    accelerator.unwrap_model(network).prepare_grad_etc(text_encoder, unet)
    for _ in range(run.steps):
        accelerator.unwrap_model(network).on_epoch_start(text_encoder, unet)
        with torch.autocast("cpu", torch.bfloat16, enabled=run.weight_dtype is not torch.float32):
            value = loss()
        accelerator.backward(value)
        accelerator.clip_grad_norm_(accelerator.unwrap_model(network).get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if run.scale_weight_norms:
            scaled, mean, most = network.apply_max_norm_regularization(run.scale_weight_norms, accelerator.device)
            assert scaled >= 0 and mean <= most <= run.scale_weight_norms * 1.001
    if run.output is not None:
        dtype = None if run.weight_dtype is torch.float32 else run.weight_dtype
        accelerator.unwrap_model(network).save_weights(str(run.output), dtype, dict(run.metadata))
    network.descriptions = descriptions
    return network
