"""Adapters of every transformer go from each spelling to each program and back, with the same ΔW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError
from peftkit.files.families.family import Family
from peftkit.files.families.module import NUMBER, ModuleSpec
from peftkit.files.families.names import FAMILIES
from tests.support.classes import rows_of, variants
from tests.support.zoo import train

SMALL = {name: family for name, family in FAMILIES.items() if any(not spec.shape for spec in family.parts[0].specs)}
EACH = pytest.mark.parametrize("family", SMALL.values(), ids=SMALL)


def matrices(family: Family) -> list[ModuleSpec]:
    """The Linears of the first and of the last block of every list, and those outside of blocks."""
    part = family.parts[0]
    models = variants(family.name, part.name)
    linear = {path for model in models for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    ends = [
        spec.numbered(str(i)) if NUMBER in spec.name else spec
        for spec in part.specs
        for i in sorted({0, max(part.depth(spec) - 1, 0)})
    ]
    unique = {module.name: module for module in ends}
    return [module for module in unique.values() if module.path in linear]


def adapter(family: Family, style: str) -> dict[str, Tensor]:
    """A LoRA of these layers under the names of a style, with weights as small as the family leaves them."""
    generator = torch.Generator().manual_seed(0)
    peft = style in ("diffusers", "peft")
    up, down = (".lora_B.weight", ".lora_A.weight") if peft else (".lora_up.weight", ".lora_down.weight")
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(family.spell(module.name, style) for module in matrices(family)):
        modules = family.find(name)
        columns = modules[0].shape[1] if modules[0].shape else 3
        tensors[name + up] = torch.randn(sum(map(rows_of, modules)), 2, generator=generator)
        tensors[name + down] = torch.randn(2, columns, generator=generator)
        if not peft:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def named(file: Path) -> set[str]:
    """The names of the modules in a file."""
    ends = (".lora_up.weight", ".lora_B.weight")
    tensors = load_file(file / "adapter_model.safetensors" if file.is_dir() else file)
    return {key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)}


def _written(family: Family, module: str, target: str) -> str:
    return family.spell(module, family.style(target, module) or "")


@EACH
@pytest.mark.parametrize("target", ["comfyui", "kohya", "lycoris", "diffusers", "peft"])
def test_a_file_of_diffusers_names_goes_to_every_program(family: Family, target: str, tmp_path: Path) -> None:
    """And from there back, which is the same ΔW: layers that the original network has fused and turned included."""
    source, out = tmp_path / "source.safetensors", tmp_path / "out"
    save_file(adapter(family, "diffusers"), source)
    out = out if target == "peft" else out.with_suffix(".safetensors")
    if target not in family.reads:
        with pytest.raises(ExportError, match=r"does not load adapters of|knows by other names"):
            pk.export(source, out, target, family=family.name)
        assert not out.exists()
        return
    report = pk.export(source, out, target)
    assert report.exact
    assert max(weight.error or 0.0 for weight in report.weights) < 1e-6
    assert named(out) == {_written(family, module.name, target) for module in matrices(family)}
    assert pk.diff(source, out).equal


@EACH
@pytest.mark.parametrize("style", ["ldm", "kohya", "lycoris", "peft"])
def test_every_spelling_is_understood(family: Family, style: str, tmp_path: Path) -> None:
    """As the same modules: a file in ComfyUI's names is written under its own for ComfyUI, apart for diffusers."""
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(adapter(family, style), source)
    reading = {"alpha": "rank"} if style == "peft" else {}
    pk.export(source, out, "comfyui", **reading)
    assert named(out) == {_written(family, module.name, "comfyui") for module in matrices(family)}
    if style != "peft":  # whose file says no scale without alpha=
        assert pk.diff(source, out).equal


# -- what came with a file or a base is never written into another program's spelling ----------------------------------


def lora(*names: str) -> dict[str, Tensor]:
    own = {f"{name}.lora_A.weight": torch.randn(2, 8) for name in names}
    return own | {f"{name}.lora_B.weight": torch.randn(8, 2) for name in names}


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net.", "diffusion_model.", ""])
def test_the_prefix_of_a_base_stays_there(prefix: str, tmp_path: Path) -> None:
    """A checkpoint of a family that is not known: its own paths are those of ComfyUI, without what it puts before."""
    base, source = tmp_path / "base.safetensors", tmp_path / "source.safetensors"
    save_file({f"{prefix}stages.0.mixer.q.weight": torch.randn(8, 8)}, base)
    save_file(lora("diffusion_model.stages.0.mixer.q"), source)
    expected = {
        "comfyui": "diffusion_model.stages.0.mixer.q",
        "lycoris": "lycoris_stages_0_mixer_q",
        "peft": "base_model.model.stages.0.mixer.q",
    }
    for target, name in expected.items():
        out = tmp_path / (target if target == "peft" else f"{target}.safetensors")
        pk.export(source, out, target, base=base)
        assert named(out) == {name}


class Named(nn.Module):
    """A model whose own path begins as the keys of some checkpoints do."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        self.add_module(attribute, nn.Sequential(nn.Linear(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


@pytest.mark.parametrize("attribute", ["net", "diffusion_model", "transformer", "unet"])
def test_a_model_in_memory_keeps_all_of_its_own_paths(attribute: str, tmp_path: Path) -> None:
    """From the model, from its file, and from its file with the model as the base."""
    model = Named(attribute)
    pk.wrap(model, "lora", targets=f"{attribute}.0", rank=2)
    train(model)
    own = pk.save(model, tmp_path / "own.safetensors")
    pk.export(model, tmp_path / "model", "peft")
    pk.export(own, tmp_path / "file", "peft")
    pk.unwrap(model)
    pk.export(own, tmp_path / "base", "peft", base=model)
    assert [named(tmp_path / each) for each in ("model", "file", "base")] == [{f"base_model.model.{attribute}.0"}] * 3


def test_the_prefix_of_a_file_stays_there(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    save_file(lora("transformer.stages.0.mixer.q"), source)
    for target, name in (("lycoris", "lycoris_stages_0_mixer_q"), ("peft", "base_model.model.stages.0.mixer.q")):
        out = tmp_path / (target if target == "peft" else f"{target}.safetensors")
        pk.export(source, out, target)
        assert named(out) == {name}


def test_names_of_an_unknown_model_go_to_comfyui_only_where_they_are_its_own(tmp_path: Path) -> None:
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    save_file(lora("transformer.stages.0.mixer.q"), source)
    with pytest.raises(ExportError, match="family='own'") as raised:
        pk.export(source, out, "comfyui")
    assert "'stages.0.mixer.q'" in str(raised.value)
    assert not out.exists()
    pk.export(source, out, "comfyui", family="own")
    assert named(out) == {"diffusion_model.stages.0.mixer.q"}


def test_a_wrapped_model_of_diffusers_goes_to_comfyui_under_comfyuis_names(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 8, "text_dim": 8}
    model = WanTransformer3DModel(in_channels=4, out_channels=4, freq_dim=8, **sizes)  # pyright: ignore[reportArgumentType]
    pk.wrap(model, "lora", targets=["blocks.*.to_q", "blocks.*.to_out.0"], rank=2)
    train(model)
    out = tmp_path / "out.safetensors"
    pk.export(model, out, "comfyui")
    attentions = [f"diffusion_model.blocks.0.{kind}_attn" for kind in ("self", "cross")]
    assert named(out) == {f"{name}.{layer}" for name in attentions for layer in "qo"}


# -- a few layers may be of several families ---------------------------------------------------------------------------


def test_layers_that_several_families_have_go_out_under_a_name_that_means_the_same_in_all(tmp_path: Path) -> None:
    """One block of Flux.1 may be of Chroma, Flux.2 or HunyuanVideo: ComfyUI has one name for it in all of these."""
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    rows = {".lora_up.weight": torch.randn(3072, 2), ".lora_down.weight": torch.randn(2, 3072)}
    save_file({f"lora_unet_double_blocks_7_img_attn_proj{end}": tensor for end, tensor in rows.items()}, source)
    pk.export(source, out, "comfyui")
    assert named(out) == {"diffusion_model.double_blocks.7.img_attn.proj"}


def test_layers_that_a_program_calls_otherwise_in_each_family_ask_which_it_is(tmp_path: Path) -> None:
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    name = "transformer.transformer_blocks.7.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.randn(2, 3072), f"{name}.lora_B.weight": torch.randn(3072, 2)}, source)
    with pytest.raises(ExportError, match=r"pass family='flux' or .*family='qwen-image'"):
        pk.export(source, out, "kohya")
    assert not out.exists()
    pk.export(source, out, "kohya", family="qwen-image")
    assert named(out) == {"lora_unet_transformer_blocks_7_attn_to_q"}
