"""Layers that one program keeps fused, or with their halves swapped, and another apart: the same ΔW on every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError

WIDTH = 3072  # of Flux
BLOCK = "transformer.transformer_blocks.0.attn."
QKV, PROJ = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"
#: rows of the shift and of the scale, which the original network has the other way round
MODULATION, TURNED = "transformer.norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1"
OTHERS = ("comfyui", "forge", "lycoris", "diffusers", "peft")


def kohya_lora(name: str, rows: int, rank: int = 2, columns: int = WIDTH) -> dict[str, Tensor]:
    up, down = torch.randn(rows, rank) * 0.1, torch.randn(rank, columns) * 0.1
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(float(rank))}


def diffusers_lora(name: str, rows: int, rank: int = 2) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.randn(rank, WIDTH) * 0.1, f"{name}.lora_B.weight": torch.randn(rows, rank)}


def product(file: Path, name: str) -> Tensor:
    """ΔW of a module, by the scale that every program gives it."""
    tensors = load_file(file)
    up, down = (name + end for end in (".lora_B.weight", ".lora_A.weight"))
    if up not in tensors:
        up, down = (name + end for end in (".lora_up.weight", ".lora_down.weight"))
    alpha = tensors.get(f"{name}.alpha", torch.tensor(float(len(tensors[down]))))
    return tensors[up].double() @ tensors[down].double() * (alpha / len(tensors[down]))


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({**kohya_lora(PROJ, WIDTH), **kohya_lora(QKV, 3 * WIDTH)}, tmp_path / "fused.safetensors")
    return tmp_path / "fused.safetensors"


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    modules = [diffusers_lora(BLOCK + name, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    save_file({key: tensor for module in modules for key, tensor in module.items()}, tmp_path / "apart.safetensors")
    return tmp_path / "apart.safetensors"


@pytest.fixture
def straight(tmp_path: Path) -> Path:
    """Of diffusers' order."""
    torch.manual_seed(2)
    tensors = {**diffusers_lora(MODULATION, 2 * WIDTH), **diffusers_lora(f"{BLOCK}to_out.0", WIDTH)}
    save_file(tensors, tmp_path / "straight.safetensors")
    return tmp_path / "straight.safetensors"


@pytest.fixture
def turned(straight: Path) -> Path:
    """The same in the original's."""
    out = straight.with_name("turned.safetensors")
    held = load_file(straight)
    named = {MODULATION: (TURNED, WIDTH), f"{BLOCK}to_out.0": (PROJ, 0)}
    tensors: dict[str, Tensor] = {}
    for name, (ours, roll) in named.items():
        tensors[f"{ours}.lora_up.weight"] = held[f"{name}.lora_B.weight"].roll(roll, 0)
        tensors[f"{ours}.lora_down.weight"] = held[f"{name}.lora_A.weight"]
        tensors[f"{ours}.alpha"] = torch.tensor(2.0)
    save_file(tensors, out)
    assert torch.allclose(product(out, TURNED).roll(WIDTH, 0), product(straight, MODULATION), atol=1e-6)
    return out


def exported(file: Path, target: str) -> Path:
    out = file.with_name(f"{target}{'' if target == 'peft' else '.safetensors'}")
    report = pk.export(file, out, target)
    assert all(w.error is not None and w.error < 1e-6 for w in report.weights)
    return out


@pytest.mark.parametrize("target", ["kohya", *OTHERS])
def test_a_fused_file_is_taken_apart_where_the_target_has_it_apart(target: str, fused: Path) -> None:
    out = exported(fused, target)
    assert pk.diff(fused, out).equal
    if target == "diffusers":
        rows = product(fused, QKV).split(WIDTH)
        for name, expected in zip(("to_q", "to_k", "to_v"), rows, strict=True):
            assert torch.allclose(product(out, BLOCK + name), expected, atol=1e-6)


@pytest.mark.parametrize("target", OTHERS)
def test_swapped_halves_are_turned_back_where_the_target_has_them_straight(
    target: str, turned: Path, straight: Path
) -> None:
    out = exported(turned, target)
    assert pk.diff(out, straight).equal
    assert pk.diff(turned, straight).equal
    if target == "diffusers":
        assert torch.allclose(product(out, MODULATION), product(straight, MODULATION), atol=1e-6)


@pytest.mark.parametrize(
    "method, options",
    [("linear", {}), ("cat", {}), ("svd", {"rank": 8}), pytest.param("ties", {}, marks=pytest.mark.slow)],
)
def test_a_combined_file_has_every_layer_once_under_the_first_files_names(
    method: str, options: dict[str, Any], fused: Path, apart: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    report = pk.combine({fused: 0.5, apart: 2.0}, one, method=method, **options)
    assert {m.name for m in report.modules} == {QKV, PROJ}
    report = pk.combine({apart: 2.0, fused: 0.5}, other, method=method, **options)
    assert {m.name for m in report.modules} == {BLOCK + name for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert max(pk.diff(one, other).distances.values()) < 1e-5
    if method != "ties":
        parts = torch.cat([product(apart, BLOCK + name) for name in ("to_q", "to_k", "to_v")])
        assert torch.allclose(product(one, QKV), 0.5 * product(fused, QKV) + 2 * parts, atol=1e-4)


def test_files_that_fuse_alike_stay_as_small_as_they_are(fused: Path, tmp_path: Path) -> None:
    """Taken apart and put together a rank would be three."""
    twin, out = fused.with_name("twin.safetensors"), tmp_path / "out.safetensors"
    twin.write_bytes(fused.read_bytes())
    pk.combine({fused: 0.25, twin: 0.75}, out, method="cat")
    assert load_file(out)[f"{QKV}.lora_down.weight"].shape[0] == 4
    assert pk.diff(out, fused).equal


def test_a_sum_of_both_orders_is_of_one(straight: Path, turned: Path, tmp_path: Path) -> None:
    for files, name in (((straight, turned), MODULATION), ((turned, straight), TURNED)):
        out = tmp_path / f"{name}.safetensors"
        pk.combine(dict.fromkeys(files, 0.5), out, method="cat")
        assert torch.allclose(product(out, name), product(files[0], name), atol=1e-5)


def test_a_module_that_only_the_second_file_has_comes_in_the_order_of_the_firsts_names(
    straight: Path, tmp_path: Path
) -> None:
    first, out = tmp_path / "first.safetensors", tmp_path / "out.safetensors"
    save_file(kohya_lora(PROJ, WIDTH), first)
    pk.combine({first: 1.0, straight: 1.0}, out)
    assert torch.allclose(product(out, TURNED).roll(WIDTH, 0), product(straight, MODULATION), atol=1e-5)


def _attention(width: int) -> nn.Module:
    model, block = nn.Module(), nn.Module()
    block.img_attn = nn.Module()
    block.img_attn.qkv, block.img_attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    model.double_blocks = nn.ModuleList([block])
    return model


def test_a_model_of_fused_layers_says_how_they_get_apart(tmp_path: Path) -> None:
    model = _attention(8)
    pk.wrap(model, "lora", rank=2)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter)
    with pytest.raises(ExportError, match="3 layers of diffusers in one"):
        pk.export(model, tmp_path / "out.safetensors", "diffusers", family="flux", component="transformer")
