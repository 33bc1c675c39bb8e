"""Every spelling of an adapter, by hand: files follow FORMATS.md, and their ΔW is computed by hand too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError
from peftkit.wrapping.installed import installed_adapters
from tests.support.architectures import conv, linear
from tests.support.files import keyed, write
from tests.support.foreign import DOWN, PRODUCT, QKV, SD15_Q, UP, XL_Q, delta_of, factors, require_delta
from tests.support.models import conv_net, tree

PAIRS = {
    "{}.lora_up.weight": "{}.lora_down.weight",
    "{}.lora_B.weight": "{}.lora_A.weight",
    "{}.lora_B": "{}.lora_A",
    "{}.lora_B.default.weight": "{}.lora_A.default.weight",
    "{}_lora.up.weight": "{}_lora.down.weight",
    "{}.lora.up.weight": "{}.lora.down.weight",
    "{}.lora_linear_layer.up.weight": "{}.lora_linear_layer.down.weight",
}
#: Where the module's name ends and its alpha's begins
ALPHAS = {"{}_lora.up.weight": "{}_lora.alpha"}
GENERIC = (
    "lycoris_heads_0",
    "lora_unet_heads_0",
    "base_model.model.heads.0",
    "diffusion_model.heads.0",
    "transformer.heads.0",
    "unet.heads.0",
    "heads.0",
)


@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("up", PAIRS)
def test_every_spelling_of_the_factors_means_the_same(up: str, name: str, tmp_path: Path) -> None:
    alpha = ALPHAS.get(up, "{}.alpha").format(name)
    file = {up.format(name): UP, PAIRS[up].format(name): DOWN, alpha: torch.tensor(1.5)}
    model, _ = conv_net()
    pk.load(model, write(tmp_path / "a.safetensors", file))
    require_delta(model, "heads.0", 0.5 * PRODUCT)


@pytest.mark.parametrize("part", ["to_q", "to_k", "to_v", "to_out"])
@pytest.mark.parametrize("ending", ["{}_lora.{}.weight", "{}.lora_{}.weight", "{}.lora.{}.weight"])
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_the_processors_of_old_diffusers_are_the_attention_itself(
    prefix: str, ending: str, part: str, tmp_path: Path
) -> None:
    """attn1.processor.to_out_lora is the module attn1.to_out.0."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    path = f"{block}.{'to_out.0' if part == 'to_out' else part}"
    up, down = torch.randn(320, 2), torch.randn(2, 320)
    stem = f"{prefix}{block}.processor.{part}"
    file = {ending.format(stem, "up"): up, ending.format(stem, "down"): down}
    model = tree({path: nn.Linear(320, 320)})
    pk.load(model, write(tmp_path / "a.safetensors", file))
    require_delta(model, path, up @ down)


_FC = "text_model.encoder.layers.3.mlp.fc1"
#: foreign name -> component, path and layer of its module, in the true sizes, which tell families apart
NAMES: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    # SD 1.5: diffusers' path and the original's
    f"lora_unet_{SD15_Q.replace('.', '_')}": ("unet", SD15_Q, linear(320, 320)),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": ("unet", SD15_Q, linear(320, 320)),
    f"lycoris_{SD15_Q.replace('.', '_')}": ("unet", SD15_Q, linear(320, 320)),
    f"unet.{SD15_Q}": ("unet", SD15_Q, linear(320, 320)),
    SD15_Q: ("unet", SD15_Q, linear(320, 320)),
    f"base_model.model.{SD15_Q}": ("unet", SD15_Q, linear(320, 320)),
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": ("unet", SD15_Q, linear(320, 320)),
    "lora_unet_input_blocks_3_0_op": ("unet", "down_blocks.0.downsamplers.0.conv", conv(320, 320, 3)),
    "lora_unet_output_blocks_11_1_proj_in": ("unet", "up_blocks.3.attentions.2.proj_in", conv(320, 320, 1)),
    "lora_unet_input_blocks_1_0_emb_layers_1": ("unet", "down_blocks.0.resnets.0.time_emb_proj", linear(320, 1280)),
    "lora_unet_time_embed_2": ("unet", "time_embedding.linear_2", linear(1280, 1280)),
    "lora_unet_input_blocks_4_0_skip_connection": ("unet", "down_blocks.1.resnets.0.conv_shortcut", conv(640, 320, 1)),
    "lora_unet_out_2": ("unet", "conv_out", conv(4, 320, 3)),
    # SDXL
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": ("unet", XL_Q, linear(640, 2048)),
    f"lora_unet_{XL_Q.replace('.', '_')}": ("unet", XL_Q, linear(640, 2048)),
    "lora_unet_label_emb_0_0": ("unet", "add_embedding.linear_1", linear(1280, 2816)),
    "diffusion_model.output_blocks.5.2.conv": ("unet", "up_blocks.1.upsamplers.0.conv", conv(640, 640, 3)),
    # text encoders
    f"lora_te_{_FC.replace('.', '_')}": ("text_encoder", _FC, linear(3072, 768)),
    f"lora_te1_{_FC.replace('.', '_')}": ("text_encoder", _FC, linear(3072, 768)),
    f"lora_te2_{_FC.replace('.', '_')}": ("text_encoder_2", _FC, linear(5120, 1280)),
    f"text_encoder.{_FC}": ("text_encoder", _FC, linear(3072, 768)),
    f"text_encoder_2.{_FC}": ("text_encoder_2", _FC, linear(5120, 1280)),
    f"text_encoders.clip_l.transformer.{_FC}": ("text_encoder", _FC, linear(3072, 768)),
    f"text_encoders.clip_g.transformer.{_FC}": ("text_encoder_2", _FC, linear(5120, 1280)),
    "lora_te3_encoder_block_2_layer_1_DenseReluDense_wo": (
        "text_encoder_3",
        "encoder.block.2.layer.1.DenseReluDense.wo",
        linear(4096, 10240),
    ),
    # SD 3
    "transformer.transformer_blocks.2.attn.to_add_out": (
        "transformer",
        "transformer_blocks.2.attn.to_add_out",
        linear(1536, 1536),
    ),
    "lora_transformer_transformer_blocks_2_attn_to_add_out": (
        "transformer",
        "transformer_blocks.2.attn.to_add_out",
        linear(1536, 1536),
    ),
    "lora_unet_joint_blocks_2_context_block_attn_proj": (
        "transformer",
        "transformer_blocks.2.attn.to_add_out",
        linear(1536, 1536),
    ),
    "diffusion_model.joint_blocks.2.x_block.mlp.fc1": (
        "transformer",
        "transformer_blocks.2.ff.net.0.proj",
        linear(6144, 1536),
    ),
    # Flux
    "lora_unet_txt_in": ("transformer", "context_embedder", linear(3072, 4096)),
    "transformer.context_embedder": ("transformer", "context_embedder", linear(3072, 4096)),
    "diffusion_model.img_in": ("transformer", "x_embedder", linear(3072, 64)),
}


def light(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer of a true size without its memory: one zero, seen everywhere."""
    with torch.device("meta"):
        layer: Any = make()
    layer.weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
    layer.bias = None
    return layer


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_module_finds_it(name: str, tmp_path: Path) -> None:
    """In a model that has that module only."""
    component, path, make = NAMES[name]
    layer: Any = light(make)
    rows, channels, *kernel = layer.weight.shape
    up, down = factors(rows, channels, tuple(kernel))
    file = keyed(name, {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(4.0)})
    model = tree({path: layer})
    assert pk.load(model, write(tmp_path / "a.safetensors", file), component=component).loaded == (path,)
    (found,) = installed_adapters(model, ["default"])
    probe = torch.randn(down[0].numel(), 5)
    with torch.no_grad():
        delta: Any = found.adapter.delta(found.base)
        expected = 2 * up.flatten(1) @ (down.flatten(1) @ probe)
        torch.testing.assert_close(delta.B @ (delta.A @ probe), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "text_encoder.text_model."])
def test_a_text_encoder_of_transformers_5_takes_names_with_the_level_it_lacks(prefix: str, tmp_path: Path) -> None:
    path = "encoder.layers.3.mlp.fc1"
    name = prefix + (path if "." in prefix else path.replace(".", "_"))
    file = keyed(name, {"lora_up.weight": torch.ones(3072, 1), "lora_down.weight": torch.ones(1, 768)})
    model = tree({path: light(linear(3072, 768))})
    report = pk.load(model, write(tmp_path / "a.safetensors", file), component="text_encoder")
    assert report.loaded == (path,)


def test_an_oft_of_sd_scripts_is_found_by_its_own_prefix(tmp_path: Path) -> None:
    blocks = 0.1 * torch.randn(80, 4, 4)
    file = keyed("oft_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", {"oft_blocks": blocks})
    file |= keyed("oft_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", {"alpha": torch.tensor(0.0)})
    model = tree({SD15_Q: nn.Linear(320, 320)})
    pk.load(model, write(tmp_path / "a.safetensors", file))
    Q = (blocks - blocks.mT).double()
    W = model.get_submodule(SD15_Q).weight.detach().double()
    R = (torch.eye(4) + Q) @ torch.linalg.inv(torch.eye(4) - Q)
    rotated = torch.einsum("knm,kni->kmi", R, W.reshape(80, 4, 320)).reshape(320, 320)
    found = delta_of(model, SD15_Q)
    assert (found - (rotated - W)).norm() <= 1e-6 * W.norm()


FUSED: dict[str, tuple[tuple[str, ...], tuple[int, ...], int]] = {
    "lora_unet_joint_blocks_2_x_block_attn_qkv": (QKV, (1536, 1536, 1536), 1536),
    "diffusion_model.joint_blocks.2.context_block.attn.qkv": (
        tuple(f"transformer_blocks.2.attn.add_{part}_proj" for part in "qkv"),
        (1536, 1536, 1536),
        1536,
    ),
}


@pytest.mark.parametrize("kind", ["lora", "loha", "full", "ia3", "dora"])
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_layer_of_the_file_goes_by_rows_to_the_models_layers(name: str, kind: str, tmp_path: Path) -> None:
    paths, sizes, columns = FUSED[name]
    rows = sum(sizes)
    up, down = torch.randn(rows, 2) / 30, torch.randn(2, columns) / 30
    dense = up @ down
    tensors: dict[str, Tensor] = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    model = tree({path: nn.Linear(columns, size) for path, size in zip(paths, sizes, strict=True)})
    W = torch.cat([model.get_submodule(path).weight.detach() for path in paths])
    if kind == "loha":
        ups, downs = torch.randn(rows, 2) / 30, torch.randn(2, columns) / 30
        tensors = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": ups, "hada_w2_b": downs, "alpha": torch.tensor(2.0)}
        dense = dense * (ups @ downs)
    elif kind == "full":
        tensors = {"diff": dense}
    elif kind == "ia3":
        gate = torch.randn(rows) / 10
        tensors, dense = {"weight": gate, "on_input": torch.tensor(0)}, gate[:, None] * W
    elif kind == "dora":
        magnitude = W.norm(dim=1, keepdim=True) * 1.1
        tensors["dora_scale"] = magnitude
        V = (W + dense).double()
        dense = V * (magnitude / V.norm(dim=1, keepdim=True)) - W
    pk.load(model, write(tmp_path / "a.safetensors", keyed(name, tensors)))
    for path, part, own in zip(paths, dense.double().split(sizes), W.split(sizes), strict=True):
        allowed = 1e-6 * float(part.norm() + (own.norm() if kind in ("dora", "ia3") else 0.0))
        assert (delta_of(model, path) - part).norm() <= allowed


def test_what_mixes_the_rows_of_a_fused_layer_is_refused(tmp_path: Path) -> None:
    model = tree({path: nn.Linear(1536, 1536) for path in QKV})
    file = keyed("lora_unet_joint_blocks_2_x_block_attn_qkv", {"oft_blocks": torch.randn(1152, 4, 4) / 10})
    with pytest.raises(FileError, match="mixes the rows"):
        pk.load(model, write(tmp_path / "a.safetensors", file))


def test_halves_in_the_order_of_the_original_are_exchanged(tmp_path: Path) -> None:
    """norm_out of diffusers has (scale, shift) where the original has (shift, scale)."""
    up, down = torch.randn(3072, 2), torch.randn(2, 1536)
    tensors = {"lora_up.weight": up, "lora_down.weight": down}
    for name, swapped in (
        ("lora_unet_final_layer_adaLN_modulation_1", True),
        ("diffusion_model.final_layer.adaLN_modulation.1", True),
        ("transformer.norm_out.linear", False),
        ("lora_transformer_norm_out_linear", False),
    ):
        model = tree({"norm_out.linear": nn.Linear(1536, 3072)})
        pk.load(model, write(tmp_path / "a.safetensors", keyed(name, tensors)))
        require_delta(model, "norm_out.linear", (up.roll(1536, 0) if swapped else up) @ down)
