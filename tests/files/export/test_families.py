"""What is exported is what the program reads: the modules of every model family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris import create_lycoris_from_weights
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError
from tests.support.architectures import (
    EACH_TARGET,
    PARTS,
    Layers,
    clip,
    conv,
    linear,
    looked_for,
    of_part,
    readable,
    tensors,
)
from tests.support.cells import out, require_equal, require_read, require_same_forward, truths, weights, wrapped
from tests.support.files import metadata
from tests.support.readers import READERS
from tests.support.zoo import train

READ_AS = {"sd35-medium": "sd3"}  # the readers know one SD3

#: Structures differ in what becomes of a fused layer; elsewhere only the names matter
PART_CELLS = [
    (family, part, adapter)
    for family, part in PARTS
    for adapter in {"transformer": ("lora", "loha", "dora", "full"), "unet": ("lora", "dora")}.get(part, ("lora",))
]


@EACH_TARGET
@pytest.mark.parametrize("family, component, adapter", PART_CELLS)
def test_a_module_of_every_kind_of_a_family_is_found(
    family: str, component: str, adapter: str, target: str, tmp_path: Path
) -> None:
    """LyCORIS and PEFT load onto any one model, by its own paths; the others by the names they know of the family."""
    model = of_part(family, component, adapter, target)
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
    model = wrapped("lora", clip(0, 1, level=""))
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
    parts = {part: looked_for(family, part, target) for part in components}
    layers = {f"{part}.{path}": make for part in components for path, make in parts[part].items()}
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
    layers = {**clip(5), "text_projection": linear(8, 8)}
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
    """Nothing reads the text after it: diffusers has (scale, shift) there, the original (shift, scale) as elsewhere."""
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
    report = pk.export(model, out(tmp_path, target), target, family="own" if target == "comfyui" else None)
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
        assert metadata(file)["ss_base_model_version"] == family
