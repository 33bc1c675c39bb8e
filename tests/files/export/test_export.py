"""What is exported is what the program reads: every adapter for every program, held against readers of those programs.

The readers of tests/support/readers were written from the programs' sources, independently of the library; where a
program is installed (LyCORIS, PEFT, diffusers) the real one loads the file too, and its forward is compared.

The bound on ΔW is 1e-6 of its norm (tests/support/cells.py says of what else for adapters that read their base). Every
adapter goes out as it is, in another exact structure, baked against its base, or is refused with a reason: which of
these is stated here cell by cell, from what FORMATS.md says each program reads, so that refusing or baking too much
fails too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris import create_lycoris_from_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError, FileError, OptionError, PeftkitError, UnknownAdapterError
from tests.support.cells import (
    ALL_LAYERS,
    LAYERS,
    MIXED,
    NET_LAYERS,
    RARE_LAYERS,
    TARGETS,
    cell,
    exists,
    model_of,
    net,
    of_kinds,
    out,
    require_equal,
    require_read,
    require_same_forward,
    tree,
    truths,
    weights,
    wrapped,
)
from tests.support.paths import ROOT
from tests.support.readers import READERS
from tests.support.real import stable_diffusion
from tests.support.zoo import ADAPTERS, train

EACH_TARGET = pytest.mark.parametrize("target", TARGETS)
WEBUI = ("a1111", "forge", "comfyui", "kohya")
#: targets whose files name tensors lora_up, lora_down, alpha
WITH_ALPHA = (*WEBUI, "lycoris")


def header(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors" if path.is_dir() else path)


# -- every adapter, every program --------------------------------------------------------------------------------------

EXACT, LOW, BAKED = "exact", "low rank", "baked"
_MARKS = {"=": EXACT, "~": LOW, "b": BAKED}
#: On the layers of a U-Net: = in the program's own structure, ~ as another of the same ΔW, b baked. FORMATS.md §0, §5
_HOW = """
                      a1111 forge comfyui kohya lycoris diffusers peft
lora                  =     =     =       =     =       =         =
lora rslora           =     =     =       =     =       =         =
lora tucker           =     =     =       =     =       =         =
loha                  =     =     =       ~     =       ~         =
loha tucker           =     =     =       ~     =       ~         =
lokr                  =     =     =       ~     =       ~         =
lokr rank             =     =     =       ~     =       ~         =
lokr tucker           =     =     =       ~     =       ~         =
lokr as told          =     =     =       ~     =       ~         =
loldu                 ~     ~     ~       ~     ~       ~         ~
loldu rank 1          ~     ~     ~       ~     ~       ~         ~
dora                  b     b     b       b     =       =         =
dora full norm        b     b     b       b     =       =         =
dora of loldu         b     b     b       b     =       =         =
dora in               =     =     =       b     b       b         b
dora of loha          b     b     b       b     =       b         b
dora of lokr in       =     =     =       b     b       b         b
full                  =     =     =       ~     =       ~         ~
ia3                   =     b     b       b     b       b         b
ia3 in                =     b     b       b     b       b         b
glora                 =     =     =       b     =       b         b
boft                  =     b     =       b     =       b         b
boft rescaled         =     b     =       b     =       b         b
oft                   =     b     =       b     =       b         b
oft in                b     b     b       b     b       b         =
oft series            b     b     b       b     b       b         =
oft bounded           =     b     =       b     b       b         b
oft rescaled geodesic =     b     b       b     =       b         b
"""
HOW = {
    (line[:21].strip(), target): _MARKS[mark]
    for line in _HOW.splitlines()[2:]
    for target, mark in zip(TARGETS, line[21:].split(), strict=True)
}
#: A1111's (IA)³ and GLoRA are for Linear only; PEFT's OFT rotates patches, which overlap where there is a kernel
HOW_ON: Mapping[tuple[str, str, str], str] = {
    ("ia3", "a1111", "conv 1×1"): BAKED,
    ("ia3", "a1111", "conv 3×3"): BAKED,
    ("glora", "a1111", "conv 1×1"): BAKED,
    ("oft in", "peft", "conv 3×3"): BAKED,
    ("oft series", "peft", "conv 3×3"): BAKED,
}
CELLS = [(a, t, layer) for a in ADAPTERS for layer in LAYERS if exists(a, layer) for t in TARGETS]
#: One of each structure: what a program makes of a layer depends on nothing else
STRUCTURES = (
    *("lora", "lora tucker", "loha", "lokr", "lokr rank", "lokr as told", "loldu", "full", "ia3", "ia3 in", "oft"),
    *("oft in", "boft", "dora", "dora in", "dora of loha", "dora of lokr in", "oft rescaled geodesic"),
)
RARE_CELLS = [
    (a, t, layer)
    for layer in RARE_LAYERS
    for a in (("lora", "full", "oft") if layer == "transposed" else STRUCTURES)
    if exists(a, layer)
    for t in TARGETS
]


def test_the_table_has_every_adapter() -> None:
    assert {adapter for adapter, _ in HOW} == set(ADAPTERS)
    assert len(CELLS) > 450


@pytest.mark.parametrize("adapter, target, layer", CELLS)
def test_a_program_reads_the_models_own_change(adapter: str, target: str, layer: str) -> None:
    """ΔW to 1e-6 at strength 1, and 0.7·ΔW at 0.7 where the program is linear; every key is read."""
    outcome = cell(adapter, target, layer)
    assert outcome.how == HOW_ON.get((adapter, target, layer), HOW[adapter, target]), outcome


DECOMPOSED = [name for name, case in ADAPTERS.items() if case.options.get("decompose")]


@pytest.mark.parametrize("adapter, target, layer", RARE_CELLS)
def test_on_other_convolutions_a_program_reads_the_same_or_the_reason_is_given(
    adapter: str, target: str, layer: str
) -> None:
    """Nobody reads a transposed convolution, and sd-scripts only Linear and Conv2d.

    LoRA's factors are of the whole convolution in sd-scripts, diffusers and PEFT, not of a group; those of PEFT's LoHa
    and LoKr are of its weight.
    """
    outcome = cell(adapter, target, layer)
    unread = {
        "conv1d": ("kohya",),
        "conv3d": ("kohya",),
        "grouped": ("kohya", "diffusers", "peft"),
        "transposed": TARGETS,
    }
    factors = ADAPTERS[adapter].kind in ("loha", "lokr") and adapter not in ("lokr as told", *DECOMPOSED)
    of_weight = (target, layer) == ("peft", "grouped") and factors
    assert (outcome.how == "refused") == (target in unread[layer] and not of_weight), outcome


@EACH_TARGET
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_file_of_several_layers_is_read_whole(adapter: str, target: str) -> None:
    assert cell(adapter, target, *(name for name in LAYERS if exists(adapter, name))).how != "refused"


@EACH_TARGET
def test_a_file_of_many_kinds_is_read_whole(target: str, tmp_path: Path) -> None:
    model = of_kinds(MIXED)
    report = pk.export(model, out(tmp_path, target), target, family="sd15")
    base, expected = weights(model), truths(model)
    require_equal(READERS[target](out(tmp_path, target), base, "sd15", 1.0), expected)
    assert [w.weight for w in report.weights] == list(MIXED)


PROGRAMS = dict(zip(TARGETS, ("A1111", "Forge", "ComfyUI", "sd-scripts", "LyCORIS", "diffusers", "PEFT"), strict=True))


@EACH_TARGET
def test_a_reason_is_about_the_program_that_was_asked_for(target: str) -> None:
    """Why a cell is baked, refused, or has another law of strength."""
    notes = {
        (adapter, layer): cell(adapter, target, layer).note
        for adapter in STRUCTURES
        for layer in ("linear", "conv 3×3", "grouped")
        if exists(adapter, layer)
    }
    others = [program for name, program in PROGRAMS.items() if name != target]
    assert {at: note for at, note in notes.items() if any(other in note for other in others)} == {}


@EACH_TARGET
@pytest.mark.parametrize(
    "adapter", [name for name, case in ADAPTERS.items() if case.kind in ("dora", "glora", "oft", "boft", "ia3")]
)
def test_bake_writes_the_change_itself(adapter: str, target: str) -> None:
    assert cell(adapter, target, "linear", bake=True).how == BAKED


# -- every family ------------------------------------------------------------------------------------------------------


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


def _clip(*layers: int, level: str = "text_model.") -> Layers:
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
    ("sd15", "text_encoder"): _clip(0, 11),
    ("sd2", "unet"): _unet(linear(8, 8), 3),
    ("sd2", "text_encoder"): _clip(0, 22),
    ("sdxl", "unet"): SDXL_UNET,
    ("sdxl", "text_encoder"): _clip(0, 11),
    ("sdxl", "text_encoder_2"): _clip(0, 31),
    ("sd3", "transformer"): SD3,
    ("sd3", "text_encoder"): _clip(0, 11),
    ("sd3", "text_encoder_2"): _clip(0, 31),
    ("sd3", "text_encoder_3"): T5,
    ("sd35-medium", "transformer"): SD35,
    ("flux", "transformer"): FLUX,
    ("flux", "text_encoder"): _clip(0, 11),
    ("flux", "text_encoder_2"): T5,
}
READ_AS = {"sd35-medium": "sd3"}  # the readers know one SD3


def readable(family: str, component: str, target: str) -> bool:
    """A1111 loads no Flux, and SD3 under names of another kind; diffusers puts nothing on a T5."""
    if target == "a1111":
        return family in ("sd15", "sd2", "sdxl")
    t5 = PARTS[family, component] is T5
    return not (target == "diffusers" and t5)


#: Structures differ in what becomes of a fused layer; elsewhere only the names matter
PART_CELLS = [
    (family, part, adapter)
    for family, part in PARTS
    for adapter in {"transformer": ("lora", "loha", "dora", "full"), "unet": ("lora", "dora")}.get(part, ("lora",))
]


@cache
def of_part(family: str, component: str, adapter: str) -> nn.Module:
    return wrapped(adapter, PARTS[family, component])


@EACH_TARGET
@pytest.mark.parametrize("family, component, adapter", PART_CELLS)
def test_a_module_of_every_kind_of_a_family_is_found(
    family: str, component: str, adapter: str, target: str, tmp_path: Path
) -> None:
    """LyCORIS and PEFT load onto any one model, by its own paths; the others by the names they know of the family."""
    model = of_part(family, component, adapter)
    path = out(tmp_path, target)
    if not readable(family, component, target):
        with pytest.raises(ExportError):
            pk.export(model, path, target, family=family, component=component)
        return
    report = pk.export(model, path, target, family=family, component=component)
    if target in ("lycoris", "peft"):
        require_read(path, target, report, model, None, "")
    else:
        require_read(path, target, report, model, READ_AS.get(family, family), f"{component}.")


@EACH_TARGET
@pytest.mark.parametrize("family, component", [("sd15", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_a_text_encoder_of_transformers_5_has_no_text_model_level(
    family: str, component: str, target: str, tmp_path: Path
) -> None:
    model = wrapped("lora", _clip(0, 1, level=""))
    path = out(tmp_path, target)
    report = pk.export(model, path, target, family=family, component=component)
    own_paths = target in ("lycoris", "peft")
    require_read(path, target, report, model, None if own_paths else family, "" if own_paths else f"{component}.")


@EACH_TARGET
@pytest.mark.parametrize(
    "family, components",
    [
        ("sd15", ("unet", "text_encoder")),
        ("sdxl", ("unet", "text_encoder", "text_encoder_2")),
        ("flux", ("transformer", "text_encoder")),
    ],
)
def test_the_parts_of_a_pipeline_go_into_one_file(
    family: str, components: tuple[str, ...], target: str, tmp_path: Path
) -> None:
    """But LyCORIS and PEFT, which load one model at a time."""
    layers = {f"{part}.{path}": make for part in components for path, make in PARTS[family, part].items()}
    model = wrapped("lora", layers)
    path = out(tmp_path, target)
    if target in ("lycoris", "peft") or not readable(family, components[0], target):
        with pytest.raises(ExportError):
            pk.export(model, path, target, family=family)
        return
    report = pk.export(model, path, target, family=family)
    assert len(report.weights) <= len(layers)
    require_read(path, target, report, model, family, "")


@pytest.mark.parametrize("family, component", [("sdxl", "text_encoder_2"), ("sd2", "text_encoder")])
@pytest.mark.parametrize("paths", [("q_proj",), ("q_proj", "v_proj")])
def test_a1111_is_not_given_part_of_an_open_clip_attention(
    family: str, component: str, paths: tuple[str, ...], tmp_path: Path
) -> None:
    """It applies nothing to a fused attention unless q, k, v and out are all in the file, and says nothing."""
    model = wrapped("lora", {f"text_model.encoder.layers.3.self_attn.{part}": linear(8, 8) for part in paths})
    path = tmp_path / "adapter.safetensors"
    try:
        report = pk.export(model, path, "a1111", family=family, component=component)
    except ExportError:
        assert not path.exists()
    else:
        require_read(path, "a1111", report, model, family, f"{component}.")


@EACH_TARGET
@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.fc1", "text_projection", "all"])
def test_parts_of_a_text_encoder_are_read_or_refused(part: str, target: str, tmp_path: Path) -> None:
    """Which of its modules a program looks for, and what it must find to take the file for one of a text encoder."""
    layers = {**_clip(5), "text_projection": linear(8, 8)}
    model = wrapped("lora", {path: make for path, make in layers.items() if part == "all" or path.endswith(part)})
    path, own_paths = out(tmp_path, target), target in ("lycoris", "peft")
    try:
        report = pk.export(model, path, target, family="sdxl", component="text_encoder_2")
    except ExportError:
        assert not path.exists()
    else:
        prefix = "" if own_paths else "text_encoder_2."
        require_read(path, target, report, model, None if own_paths else "sdxl", prefix)


def test_one_of_three_fused_projections_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    """sd-scripts fuses q, k and v; in the true size, because the rows of the others are those of the family."""
    name = "transformer_blocks.0.attn.to_{}"
    model = wrapped("lora", {name.format("k"): lambda: nn.Linear(1536, 1536)})
    path = tmp_path / "adapter.safetensors"
    pk.export(model, path, "kohya", family="sd3")
    base = weights(model, "transformer.")
    base |= {f"transformer.{name.format(part)}": torch.zeros(1536, 1536) for part in "qv"}
    require_equal(READERS["kohya"](path, base, "sd3", 1.0), truths(model, "transformer."))


def test_the_last_modulation_of_sd3s_text_is_in_the_order_of_the_original(tmp_path: Path) -> None:
    """Nothing reads the text after it: diffusers has (scale, shift) there, the original (shift, scale) as elsewhere.

    By hand, because the readers know the last block as any other.
    """
    for block, swapped in ((22, False), (23, True)):
        name = f"transformer_blocks.{block}.norm1_context.linear"
        model = wrapped("lora", {name: linear(16, 8)})
        path = tmp_path / f"{block}.safetensors"
        pk.export(model, path, "kohya", family="sd3")
        held = tensors(path)
        key = f"lora_unet_joint_blocks_{block}_context_block_adaLN_modulation_1"
        up, down, alpha = (held[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        ((delta, allowed),) = truths(model, "").values()
        written = (up @ down).double() * alpha / len(down)
        assert (written - (delta.roll(8, 0) if swapped else delta)).norm() <= allowed


GENERIC: Layers = {
    "stem": conv(8, 4, 3),
    "blocks.0.mixer.in_proj": linear(16, 8),
    "blocks.0.mixer.out_proj": linear(8, 16),
    "blocks.1.alpha_net": linear(8, 8),
    "head.0": linear(4, 8),
}


@pytest.mark.parametrize("adapter", ["lora", "loha", "lokr rank", "loldu", "dora", "full", "oft"])
@pytest.mark.parametrize("target", ["lycoris", "peft", "comfyui"])
def test_any_model_goes_to_programs_that_load_any(adapter: str, target: str, tmp_path: Path) -> None:
    model = wrapped(adapter, GENERIC)
    report = pk.export(model, out(tmp_path, target), target)
    require_read(out(tmp_path, target), target, report, model, None, "")


@pytest.mark.parametrize("target", ["a1111", "kohya", "diffusers"])
def test_programs_that_know_their_models_refuse_another(target: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="family"):
        pk.export(wrapped("lora", GENERIC), tmp_path / "adapter.safetensors", target)
    with pytest.raises(ExportError, match="stem"):
        pk.export(wrapped("lora", GENERIC), tmp_path / "adapter.safetensors", target, family="sdxl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["lycoris", "peft"])
def test_projections_without_a_module_of_their_own_are_refused(target: str, tmp_path: Path) -> None:
    """q, k and v of nn.MultiheadAttention are rows of a parameter: no program finds a module of that name."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    pk.wrap(model, "lora", rank=2)
    train(model)
    with pytest.raises(ExportError, match="attention"):
        pk.export(model, out(tmp_path, target), target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["lycoris", "peft", "comfyui"])
@torch.no_grad()
def test_a_layer_that_is_the_whole_model_has_a_name_for_lycoris_only(target: str, tmp_path: Path) -> None:
    model = nn.Linear(8, 12)
    pk.wrap(model, "lora", rank=2)
    train(model)
    if target == "lycoris":
        base, x = nn.Linear(8, 12), torch.randn(2, 8)
        base.load_state_dict({name: model.state_dict()[name] for name in ("weight", "bias")})
        pk.export(model, out(tmp_path, target), target)
        network, _ = create_lycoris_from_weights(1.0, str(out(tmp_path, target)), base)
        before = base(x)
        network.apply_to()
        require_same_forward(model(x), base(x), before)
    else:
        with pytest.raises(ExportError):
            pk.export(model, out(tmp_path, target), target)
        assert list(tmp_path.iterdir()) == []


def test_the_family_is_found_by_names_and_true_shapes(tmp_path: Path) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, family in ((768, "sd_v1"), (1024, "sd_v2_v")):
        file = tmp_path / f"{family}.safetensors"
        pk.export(wrapped("lora", {path: linear(320, width)}), file, "a1111")
        assert header(file)["ss_base_model_version"] == family


# -- what else a file has ----------------------------------------------------------------------------------------------

RANKED = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": {"rank": 2, "alpha": 3},
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": {"rank": 4, "alpha": 1},
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v": {"rank": 4, "alpha": 8},
    "down_blocks.0.resnets.0.conv1": {"rank": 5},
}


def ranked() -> nn.Module:
    torch.manual_seed(0)
    model = tree({path: nn.Conv2d(8, 16, 3) if "conv" in path else nn.Linear(8, 16) for path in RANKED})
    pk.wrap(model, rules=[pk.Rule(path, "lora", **options) for path, options in RANKED.items()])
    train(model)
    return model


@EACH_TARGET
def test_one_alpha_is_shared_by_all_low_rank_modules(target: str, tmp_path: Path) -> None:
    """diffusers gives attention layers the commonest alpha, whatever theirs is; PEFT's spelling has none."""
    path = out(tmp_path, target)
    report = pk.export(ranked(), path, target, family="sd15")
    require_read(path, target, report, ranked(), "sd15")
    alphas = [tensor for key, tensor in tensors(path).items() if key.endswith("alpha")]
    assert len(alphas) == (len(RANKED) if target in WITH_ALPHA else 0)
    assert all(alpha.shape == () and alpha.dtype == torch.float32 for alpha in alphas)
    assert {alpha.item() for alpha in alphas} == ({4.0} if alphas else set())
    if target in ("kohya", "a1111"):
        diffusers = READERS["diffusers"](path, weights(ranked()), "sd15", 1.0)
        require_equal(diffusers, truths(ranked()))


#: What belongs together, without what may be beside it: the magnitude of DoRA
SETS = (
    {"lora_up.weight", "lora_down.weight", "alpha"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    {"lokr_w1", "lokr_w2", "alpha"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"},
    {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"},
    {"oft_blocks", "alpha"},
    {"weight", "on_input"},
    {"diff"},
    {"lora_A.weight", "lora_B.weight"},
)


@EACH_TARGET
def test_every_module_has_a_whole_set_of_tensors(target: str, tmp_path: Path) -> None:
    """A1111 drops a file over a lone tensor, and LyCORIS over a missing alpha."""
    pk.export(of_kinds(MIXED), out(tmp_path, target), target, family="sd15")
    modules: dict[str, set[str]] = {}
    for key in tensors(out(tmp_path, target)):
        module, _, suffix = key.rpartition(".lora_") if target not in WITH_ALPHA else key.partition(".")
        modules.setdefault(module, set()).add(suffix if target in WITH_ALPHA else f"lora_{suffix}")
    assert len(modules) == len(MIXED)
    magnitudes = {"dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"}
    assert all(own - magnitudes in SETS for own in modules.values()), modules


@pytest.mark.parametrize("target", ["lycoris", "comfyui", "peft"])
def test_two_modules_of_one_name_in_the_file_are_refused(target: str, tmp_path: Path) -> None:
    """Underscores for dots make a.b_c and a_b.c one; dotted names keep them apart."""
    model = wrapped("lora", {"a.b_c": linear(8, 4), "a_b.c": linear(8, 4)})
    if target == "lycoris":
        with pytest.raises(ExportError, match=r"'a\.b_c' and 'a_b\.c'"):
            pk.export(model, out(tmp_path, target), target)
        assert list(tmp_path.iterdir()) == []
    else:
        report = pk.export(model, out(tmp_path, target), target)
        require_read(out(tmp_path, target), target, report, model, None, "")


LABELS = {
    "sd15": ("sd_v1", "False", "stable-diffusion-v1/lora", "diffusers", "512x512"),
    "sd2": ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "diffusers", "768x768"),
    "sdxl": (
        "sdxl_base_v1-0",
        "False",
        "stable-diffusion-xl-v1-base/lora",
        "https://github.com/Stability-AI/generative-models",
        "1024x1024",
    ),
    "flux": ("flux1", "False", "flux-1-dev/lora", "https://github.com/black-forest-labs/flux", "1024x1024"),
}


@pytest.mark.parametrize("target", ["a1111", "forge", "comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize("family", LABELS)
def test_the_header_says_which_model_the_file_is_for(family: str, target: str, tmp_path: Path) -> None:
    """Without it A1111 files any adapter under SD1, and hides it from the others."""
    if not readable(family, "transformer" if family == "flux" else "unet", target):
        return
    component = "transformer" if family == "flux" else "unet"
    model = of_part(family, component, "lora")
    path = tmp_path / "style.safetensors"
    pk.export(model, path, target, family=family, title="A style")
    entries = header(path)
    version, v2, architecture, implementation, resolution = LABELS[family]
    assert entries["ss_base_model_version"] == version
    assert entries["ss_v2"] == v2
    assert entries["modelspec.sai_model_spec"] == "1.0.1"
    assert entries["modelspec.architecture"] == architecture
    assert entries["modelspec.implementation"] == implementation
    assert entries["modelspec.title"] == "A style"
    assert entries["modelspec.resolution"] == resolution


@pytest.mark.parametrize("target", WEBUI)
def test_the_header_says_what_the_network_is(target: str, tmp_path: Path) -> None:
    pk.export(ranked(), tmp_path / "style.safetensors", target, family="sd15")
    entries = header(tmp_path / "style.safetensors")
    assert entries["ss_network_module"] == "networks.lora"
    assert (entries["ss_network_dim"], entries["ss_network_alpha"]) == ("4", "4")
    assert entries["ss_output_name"] == entries["modelspec.title"] == "style"
    pk.export(model_of("full", "linear"), tmp_path / "full.safetensors", target, family="sd15")
    module = "networks.lora" if target == "kohya" else "lycoris.kohya"
    assert header(tmp_path / "full.safetensors")["ss_network_module"] == module


def big() -> nn.Module:
    """An adapter of more than a MiB, with tensors of two dtypes when it is exported to fp16."""
    torch.manual_seed(0)
    model = tree({ALL_LAYERS["linear"].path: nn.Linear(900, 1100)})
    pk.wrap(model, "lora", rank=300)
    train(model, size=0.01)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", ["a1111", "lycoris", "diffusers"])
def test_the_hashes_are_those_a_webui_computes(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """sha256 after the header; and sd-scripts' older one, of 64 KiB at 1 MiB of a file with only its own entries."""
    path = tmp_path / "adapter.safetensors"
    pk.export(big(), path, target, family="sd15", dtype=dtype, training={"ss_steps": "10", "modelspec.author": "me"})
    content, entries = path.read_bytes(), header(path)
    assert len(content) > (1 << 20) + (1 << 16)
    start = 8 + int.from_bytes(content[:8], "little")
    assert content[8:10] == b'{"'
    assert entries["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    own = {key: value for key, value in entries.items() if key.startswith("ss_")}
    kohya = save_bytes(load_file(path), own)
    assert entries["sshs_legacy_hash"] == hashlib.sha256(kohya[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8]


def test_the_hash_of_a_small_file_is_kohyas_of_nothing(tmp_path: Path) -> None:
    pk.export(ranked(), tmp_path / "small.safetensors", "kohya", family="sd15")
    assert header(tmp_path / "small.safetensors")["sshs_legacy_hash"] == "e3b0c442"


_EXPORT_ALL = """
import hashlib, sys
from pathlib import Path
import peftkit as pk
from tests.support.cells import MIXED, TARGETS, of_kinds, out
for target in TARGETS:
    path = out(Path(sys.argv[1]), target)
    pk.export(of_kinds(MIXED), path, target, family="sd15", training={"ss_epoch": 3, "ss_tag_frequency": {"a": {}}})
    for file in sorted([path] if path.is_file() else path.iterdir()):
        print(target, file.name, hashlib.sha256(file.read_bytes()).hexdigest())
"""


def test_the_same_export_gives_the_same_bytes_in_another_process(tmp_path: Path, capsys: Any) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    environment = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _EXPORT_ALL, str(tmp_path / "there")]
    there = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    ).stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(tmp_path / "here")])
        exec(_EXPORT_ALL, {})
    assert capsys.readouterr().out == there
    assert len(there.splitlines()) == len(TARGETS) + 1


def test_entries_of_the_user_are_kept(tmp_path: Path) -> None:
    training = {
        "ss_learning_rate": 1e-4,
        "ss_training_started_at": 1700000000.5,
        "ss_tag_frequency": {"10_cat": {"cat": 3, "größe": 1}},
        "ss_dataset_dirs": '{"10_cat": {"n_repeats": 10, "img_count": 5}}',
        "ss_network_dim": "16",
        "modelspec.author": "somebody",
        "modelspec.date": "2026-01-01",
    }
    pk.export(ranked(), tmp_path / "adapter.safetensors", "kohya", family="sd15", training=training)
    entries = header(tmp_path / "adapter.safetensors")
    assert all(isinstance(value, str) for value in entries.values())
    assert float(entries["ss_learning_rate"]) == 1e-4
    assert float(entries["ss_training_started_at"]) == 1700000000.5
    assert json.loads(entries["ss_tag_frequency"]) == training["ss_tag_frequency"]
    for key in ("ss_dataset_dirs", "ss_network_dim", "modelspec.author", "modelspec.date"):
        assert entries[key] == training[key]


@pytest.mark.parametrize(
    "entry, value",
    [
        ("ss_training_started_at", "soon"),
        ("ss_training_started_at", "nan"),
        ("ss_training_finished_at", [1]),
        ("ss_dataset_dirs", "10_cat"),
        ("ss_bucket_info", "{"),
        ("ss_tag_frequency", "{'a': 1}"),
        ("ss_network_args", "factor=8"),
        ("sshs_model_hash", "0" * 64),
        ("sshs_legacy_hash", "00000000"),
        ("ss_tag_frequency", {"a": {1, 2}}),
        ("lora_adapter_metadata", "{}"),
        ("peftkit", "{}"),
    ],
)
def test_entries_that_a_program_would_fail_on_are_refused(entry: str, value: Any, tmp_path: Path) -> None:
    """diffusers raises on its own entry beside alpha tensors, and this library reads its own as another format."""
    with pytest.raises(OptionError, match=entry):
        pk.export(ranked(), tmp_path / "a.safetensors", "kohya", family="sd15", training={entry: value})
    assert list(tmp_path.iterdir()) == []


ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


@EACH_TARGET
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_narrow_dtype_costs_its_rounding(adapter: str, dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    """Two factors are off by u each, so their product by (2u + u²)·|B|·|A|; the change by u; alphas by nothing."""
    model = model_of(adapter, "linear", "conv 3×3")
    path = out(tmp_path, target)
    pk.export(model, path, target, family="sd15", dtype=dtype)
    held = tensors(path)
    assert {tensor.dtype for key, tensor in held.items() if "alpha" not in key} == {dtype}
    assert {tensor.dtype for key, tensor in held.items() if "alpha" in key} <= {torch.float32}
    read = READERS[target](path, weights(model), "sd15", 1.0)
    assert read.ignored == []
    u = ROUNDING[dtype]
    for name, (delta, _) in truths(model).items():
        size = delta
        if adapter == "lora":
            own = model.get_submodule(name.removeprefix("unet.")).adapters["default"]
            size = (1.5 / 3 * own.up.detach().double().abs() @ own.down.detach().double().abs()).reshape(delta.shape)
        factor = 2 * u + u * u if adapter == "lora" or target in ("kohya", "diffusers", "peft") else u
        assert (read.deltas[name] - delta).norm() <= (factor + 1e-6) * size.norm(), name


def scaled(adapter: str, by: float) -> nn.Module:
    model = copy.deepcopy(model_of(adapter, "linear"))
    with torch.no_grad():
        for parameter in pk.adapter_parameters(model):
            parameter.mul_(by)
    return model


@EACH_TARGET
@pytest.mark.parametrize("adapter", ["lora", "full", "lokr"])
def test_what_a_dtype_cannot_hold_is_refused(adapter: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"not finite as torch\.float16"):
        pk.export(scaled(adapter, 1e12), out(tmp_path, target), target, family="sd15", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@EACH_TARGET
def test_what_vanishes_in_a_dtype_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="zero"):
        pk.export(scaled("full", 1e-20), out(tmp_path, target), target, family="sd15", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "adapter, target", [*((adapter, "comfyui") for adapter in ADAPTERS), *(("lora", target) for target in TARGETS)]
)
def test_an_adapter_that_does_nothing_is_refused_and_what_was_there_stays(
    adapter: str, target: str, tmp_path: Path
) -> None:
    layer = next(layer for layer in LAYERS if exists(adapter, layer))
    model, case, path = tree({LAYERS[layer].path: LAYERS[layer].make()}), ADAPTERS[adapter], out(tmp_path, target)
    pk.wrap(model, case.kind, **case.options)
    with pytest.raises(FileError):
        pk.export(model, path, target, family="sd15")
    assert list(tmp_path.iterdir()) == []
    if target == "peft":
        path.mkdir()
    existing = path / "notes.txt" if target == "peft" else path
    existing.write_bytes(b"what was there")
    with pytest.raises(FileError):
        pk.export(model, path, target, family="sd15")
    assert existing.read_bytes() == b"what was there"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [existing]


@EACH_TARGET
def test_a_parameter_that_is_not_finite_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(PeftkitError):
        pk.export(scaled("lora", float("nan")), out(tmp_path, target), target, family="sd15")
    assert list(tmp_path.iterdir()) == []


@EACH_TARGET
def test_a_file_that_is_there_is_replaced_only_by_a_whole_one(target: str, tmp_path: Path) -> None:
    """A folder with anything in it is not: it may hold more than the adapter."""
    path = out(tmp_path, target)
    pk.export(model_of("lora", "linear"), path, target, family="sd15")
    before = tensors(path)
    if target == "peft":
        with pytest.raises(FileError, match="already"):
            pk.export(model_of("full", "linear"), path, target, family="sd15")
        assert tensors(path).keys() == before.keys()
    else:
        pk.export(model_of("full", "linear"), path, target, family="sd15")
        assert {tensor.shape for tensor in tensors(path).values()} != {tensor.shape for tensor in before.values()}
    assert len(list(tmp_path.iterdir())) == 1


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    model, path = model_of("lora", "linear"), tmp_path / "adapter.safetensors"
    with pytest.raises(OptionError, match="a1111"):
        pk.export(model, path, "a111")
    with pytest.raises(OptionError, match="sd15"):
        pk.export(model, path, "a1111", family="sd1")
    with pytest.raises(OptionError, match="safetensors"):
        pk.export(model, tmp_path / "adapter.pt", "a1111", family="sd15")
    with pytest.raises(OptionError, match="dtype"):
        pk.export(model, path, "a1111", family="sd15", dtype=torch.int8)
    with pytest.raises(ExportError, match=r"ff\.net\.2"):
        pk.export(model, path, "a1111", family="flux")
    assert list(tmp_path.iterdir()) == []


def test_of_several_adapters_the_named_one_goes_out(tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("lora", "linear"))
    pk.wrap(model, "full", name="second")
    train(model, seed=4, name="second")
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(UnknownAdapterError, match="second"):
        pk.export(model, path, "a1111", family="sd15")
    pk.export(model, path, "a1111", family="sd15", name="second")
    require_equal(READERS["a1111"](path, weights(model), "sd15", 1.0), truths(model, name="second"))


@EACH_TARGET
@pytest.mark.parametrize("adapter", ["lora", "dora", "glora", "ia3"])
def test_a_merged_model_exports_the_same_bytes(adapter: str, target: str, tmp_path: Path) -> None:
    model = copy.deepcopy(model_of(adapter, "linear"))
    pk.export(model, out(tmp_path, target, "before"), target, family="sd15", title="t")
    pk.merge(model)
    pk.export(model, out(tmp_path, target, "after"), target, family="sd15", title="t")
    before, after = tensors(out(tmp_path, target, "before")), tensors(out(tmp_path, target, "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@EACH_TARGET
def test_the_report_is_of_the_file(target: str, tmp_path: Path) -> None:
    model = of_kinds(MIXED)
    report = pk.export(model, out(tmp_path, target), target, family="sd15")
    held = tensors(out(tmp_path, target))
    assert sum(w.bytes for w in report.weights) == sum(tensor.nbytes for tensor in held.values())
    assert all(any(key.startswith(f"{w.written}.") for key in held) for w in report.weights)
    assert report.exact == all(w.how != "baked" for w in report.weights)
    assert f"{len(MIXED)} weights" in str(report)
    assert report.table().row_count == len(MIXED)
    assert sum(w.own for w in report.weights) == sum(p.nbytes for p in pk.adapter_parameters(model))
    errors = [w.error for w in report.weights]
    assert all(error is not None and error < 1e-5 for error in errors)


# -- the programs themselves -------------------------------------------------------------------------------------------


def adapted_net(adapter: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The base, the same with the adapter on every layer that can have it, and an input."""
    base, x = net()
    model, case = copy.deepcopy(base), ADAPTERS[adapter]
    fitting = []
    for name in NET_LAYERS:
        try:
            pk.plan(model, case.kind, targets=name, **case.options)
        except PeftkitError:
            continue
        fitting.append(name)
    pk.wrap(model, case.kind, targets=fitting, **case.options)
    train(model, size=0.6 if "tucker" in adapter else 0.2)
    return base, model.eval(), x


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_lycoris_itself_computes_what_we_do(adapter: str, tmp_path: Path) -> None:
    base, model, x = adapted_net(adapter)
    path = tmp_path / "adapter.safetensors"
    report = pk.export(model, path, "lycoris")
    theirs = copy.deepcopy(base)
    network, _ = create_lycoris_from_weights(1.0, str(path), theirs)
    network.apply_to()
    assert {lora.lora_name for lora in network.loras} == {w.written for w in report.weights}
    require_same_forward(model(x), theirs(x), base(x))


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_peft_itself_computes_what_we_do(adapter: str, tmp_path: Path) -> None:
    base, model, x = adapted_net(adapter)
    report = pk.export(model, tmp_path / "adapter", "peft")
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    adapted = [name for name, module in theirs.named_modules() if isinstance(module, BaseTunerLayer)]
    assert sorted(adapted) == sorted(w.written for w in report.weights)
    require_same_forward(model(x), theirs(x), base(x))


@pytest.mark.parametrize("adapter", ["loha", "lokr", "lokr rank"])
@torch.no_grad()
def test_peft_itself_computes_what_we_do_on_a_grouped_convolution(adapter: str, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2))
    model, x = copy.deepcopy(base), torch.randn(2, 8, 5, 5)
    pk.wrap(model, ADAPTERS[adapter].kind, **ADAPTERS[adapter].options)
    train(model, size=0.2)
    pk.export(model, tmp_path / "adapter", "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    require_same_forward(model(x), theirs(x), base(x))


def outputs(unet: Any, text_encoder: Any) -> tuple[Tensor, Tensor]:
    """Of the text encoder, and of the U-Net given its states."""
    torch.manual_seed(3)
    x, ids = torch.randn(1, 4, 8, 8), torch.tensor([[0, 3, 7, 1]])
    states = text_encoder(ids).last_hidden_state
    return states, unet(x, torch.tensor([37]), states).sample


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "adapter, unet_targets",
    [
        ("lora", "full"),
        ("loha", "*.attn1.*"),
        ("dora", "re:.*(attn2|resnets).*"),
        ("oft", "*.conv*"),
        ("loldu", "*ff*"),
    ],
)
@torch.no_grad()
def test_diffusers_itself_computes_what_we_do(adapter: str, unet_targets: str, target: str, tmp_path: Path) -> None:
    """A pipeline's U-Net, all of it once, and its text encoder, from one file; every module gets its adapter."""
    pipe, case = stable_diffusion(), ADAPTERS[adapter]
    base = outputs(pipe.unet, pipe.text_encoder)
    model = nn.ModuleDict({"unet": copy.deepcopy(pipe.unet), "text_encoder": copy.deepcopy(pipe.text_encoder)})
    unet_modules = [
        site.site.name for site in pk.plan(model["unet"], case.kind, targets=unet_targets, **case.options).entries
    ]
    text_modules = [f"text_encoder.{site.site.name}" for site in pk.plan(model["text_encoder"], "lora").entries]
    pk.wrap(model, case.kind, targets=[*(f"unet.{name}" for name in unet_modules), *text_modules], **case.options)
    train(model, size=0.05)
    report = pk.export(model, tmp_path / "adapter.safetensors", target, family="sd15")
    pipe.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    adapted = {
        f"{component}.{name}"
        for component in ("unet", "text_encoder")
        for name, module in getattr(pipe, component).named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    assert adapted == {w.weight for w in report.weights}
    ours, theirs = outputs(model["unet"], model["text_encoder"]), outputs(pipe.unet, pipe.text_encoder)
    for own, real, before in zip(ours, theirs, base, strict=True):
        require_same_forward(own, real, before)


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "component, rules",
    [
        ("unet", {"*.attn1.to_q": "lora", "*.attn1.to_k": "dora", "*.proj_in": "loha", "*.conv1": "dora in"}),
        ("text_encoder", {"*.self_attn.q_proj": "lora", "*.self_attn.out_proj": "loha", "*.mlp.fc2": "dora"}),
    ],
    ids=["unet", "text_encoder"],
)
@torch.no_grad()
def test_diffusers_itself_reads_files_of_many_kinds_and_of_few_modules(
    component: str, rules: dict[str, str], target: str, tmp_path: Path
) -> None:
    """Of sd-scripts' files it knows the attention of a text encoder by its out_proj, and loses it without."""
    pipe = stable_diffusion()
    base = outputs(pipe.unet, pipe.text_encoder)
    model = copy.deepcopy(getattr(pipe, component))
    pk.wrap(model, rules=[pk.Rule(at, ADAPTERS[name].kind, **ADAPTERS[name].options) for at, name in rules.items()])
    train(model, size=0.1)
    parts = (model, pipe.text_encoder) if component == "unet" else (pipe.unet, model)
    ours = outputs(*parts)
    pk.export(model, tmp_path / "adapter.safetensors", target, family="sd15", component=component)
    pipe.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    theirs, own = outputs(pipe.unet, pipe.text_encoder), ("text_encoder", "unet").index(component)
    require_same_forward(ours[own], theirs[own], base[own])


def test_a_text_encoder_without_attention_is_refused_for_diffusers(tmp_path: Path) -> None:
    """diffusers takes the ranks of a text encoder from its attention layers, and fails where a file has none."""
    model = copy.deepcopy(stable_diffusion().text_encoder)
    pk.wrap(model, "lora", targets=["*.mlp.fc1"])
    with pytest.raises(ExportError, match="without attention"):
        pk.export(model, tmp_path / "adapter.safetensors", "diffusers", family="sd15", component="text_encoder")
    assert not list(tmp_path.iterdir())


def test_names_of_a_model_that_is_not_known_lose_what_a_program_put_before_them(tmp_path: Path) -> None:
    """lycoris_lycoris_… is nobody's; and underscores do not say where the dots of PEFT's names are."""
    path, name = tmp_path / "x.safetensors", "lycoris_layers_0_q_proj"
    factors = {f"{name}.lora_up.weight": torch.ones(8, 2), f"{name}.lora_down.weight": torch.ones(2, 8)}
    save_file({**factors, f"{name}.alpha": torch.tensor(2.0)}, path)
    report = pk.export(path, tmp_path / "out.safetensors", "lycoris")
    assert [w.written for w in report.weights] == [name]
    for target in ("comfyui", "peft"):
        with pytest.raises(ExportError, match="where its dots were"):
            pk.export(path, tmp_path / f"out-{target}.safetensors", target)
