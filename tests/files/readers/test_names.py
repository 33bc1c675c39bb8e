"""The names that each loader knows, and fused, swapped and padded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.by_hand import (
    BASE,
    CONV,
    DOWN,
    KEY,
    LINEAR,
    LORA,
    POINT,
    QUERY,
    UP,
    found,
    kohya_key,
    near,
    t,
    unet_paths,
    write_adapter,
)
from tests.support.files import keyed
from tests.support.paths import ROOT
from tests.support.readers import READERS, Refused, dit_names, unet_names


def test_number_of_modules() -> None:
    assert len(unet_paths("sd15")) == 391
    assert len(unet_paths("sdxl")) == 1050
    for family in ("sd15", "sdxl"):
        ldm = {unet_names.to_ldm(path, family) for path in unet_paths(family)}
        assert len(ldm) == len(unet_paths(family))


ABSENT_IN_A1111 = {
    "sd15": {"conv_norm_out"},
    "sdxl": {"conv_norm_out", "add_embedding.linear_1", "add_embedding.linear_2", "up_blocks.0.upsamplers.0.conv"},
}
ABSENT_IN_DIFFUSERS = {"sd15": set[str](), "sdxl": {"add_embedding.linear_1", "add_embedding.linear_2"}}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_coverage_of_unet_names(family: str, tmp_path: Path) -> None:
    paths = unet_paths(family)
    diffusers = ["lora_unet_" + path.replace(".", "_") for path in paths]
    ldm = ["lora_unet_" + unet_names.to_ldm(path, family).replace(".", "_") for path in paths]
    lycoris = ["lycoris_" + path.replace(".", "_") for path in paths]
    every = set(paths)
    outside = {path for path in every if path.startswith(("conv_", "time_embedding", "add_embedding"))}
    for loader in ("comfyui", "forge", "lycoris"):
        assert found(loader, diffusers, family, tmp_path) == every
    assert found("kohya", diffusers, family, tmp_path) == every - outside
    assert found("a1111", diffusers, family, tmp_path) == every - ABSENT_IN_A1111[family]
    linear = {path for path in every if "norm" not in path}
    assert found("diffusers", diffusers, family, tmp_path) & linear == linear - ABSENT_IN_DIFFUSERS[family]
    for loader in ("comfyui", "forge", "a1111", "lycoris"):
        assert found(loader, ldm, family, tmp_path) == every
    assert found("kohya", ldm, family, tmp_path) == (every - outside if family == "sdxl" else set())
    in_diffusers = found("diffusers", ldm, family, tmp_path)
    if family == "sdxl":
        assert in_diffusers >= linear
    else:
        assert in_diffusers == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    for loader in ("comfyui", "forge", "lycoris"):
        assert found(loader, lycoris, family, tmp_path) == every
    assert not found("a1111", lycoris, family, tmp_path)
    with pytest.raises(Refused, match="lora"):
        found("diffusers", lycoris, family, tmp_path)
    wrong = ["lycoris_" + unet_names.to_ldm(path, family).replace(".", "_") for path in paths]
    assert not found("comfyui", wrong, family, tmp_path)


def test_diffusers_peft_names_lose_attention_in_comfyui(tmp_path: Path) -> None:
    tensors = {
        f"{name}.lora_{letter}.weight": tensor
        for name in (QUERY, KEY, LINEAR)
        for letter, tensor in (("A", DOWN), ("B", UP))
    }
    file, weights = write_adapter(tmp_path, tensors), {QUERY: BASE, KEY: BASE, LINEAR: BASE}
    assert READERS["diffusers"](file, weights, "sd15").deltas.keys() == weights.keys()
    assert READERS["comfyui"](file, weights, "sd15").deltas.keys() == {LINEAR}
    spelled = {key.replace("attn1.to_", "attn1.processor.to_"): tensor for key, tensor in tensors.items()}
    assert READERS["comfyui"](write_adapter(tmp_path, spelled), weights, "sd15").deltas.keys() == weights.keys()


def text_names(family: str) -> dict[str, str]:
    """Canonical name of one layer of each text encoder -> kohya's name of it."""
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    prefixes = {"sd15": ["lora_te_"], "sd2": ["lora_te_"], "sdxl": ["lora_te1_", "lora_te2_"]}[family]
    return {
        f"{component}.{layer}": prefix + layer.replace(".", "_")
        for component, prefix in zip(("text_encoder", "text_encoder_2"), prefixes, strict=False)
    }


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_text_encoders(family: str, tmp_path: Path) -> None:
    """Every loader knows kohya's names; OpenCLIP in A1111 needs q, k, v and out together."""
    names = text_names(family)
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    whole = {name.replace("q_proj", part): key.replace("q_proj", part) for name, key in names.items() for part in parts}
    tensors = {
        full: tensor for key in names.values() for full, tensor in keyed(key, {**LORA, "alpha": torch.ones(1)}).items()
    }
    every = {
        full: tensor for key in whole.values() for full, tensor in keyed(key, {**LORA, "alpha": torch.ones(1)}).items()
    }
    weights = dict.fromkeys(whole, BASE)
    for loader in ("comfyui", "forge", "kohya", "lycoris", "a1111", "diffusers"):
        assert READERS[loader](write_adapter(tmp_path, every), weights, family).deltas.keys() == whole.keys()
    for loader in ("comfyui", "forge", "kohya", "lycoris"):
        assert READERS[loader](write_adapter(tmp_path, tensors), weights, family).deltas.keys() == names.keys()
    alone = READERS["a1111"](write_adapter(tmp_path, tensors), weights, family)
    assert alone.deltas.keys() == ({next(iter(names))} if family != "sd2" else set())
    with pytest.raises(Refused, match="infer"):  # no to_out and no mlp to tell the format from
        READERS["diffusers"](write_adapter(tmp_path, tensors), weights, family)


BLOCK = "transformer.transformer_blocks.0"
QKV = {f"{BLOCK}.attn.to_{letter}": torch.randn(3, 4) for letter in "qkv"}


def test_fused_attention(tmp_path: Path) -> None:
    """Separate q, k, v reach their rows of the fused weight; a fused file is cut back into q, k, v."""
    up, down = torch.randn(9, 2), torch.randn(2, 4)
    product = up @ down
    expected = dict(zip(QKV, product.chunk(3), strict=True))
    for family, module in (("flux", "double_blocks.0.img_attn.qkv"), ("sd3", "joint_blocks.0.x_block.attn.qkv")):
        fused = keyed(
            "lora_unet_" + module.replace(".", "_"),
            {"lora_up.weight": up, "lora_down.weight": down, "alpha": t(2.0)},
        )
        split = {
            f"lora_transformer_{name.removeprefix('transformer.').replace('.', '_')}.{tensor}": value
            for name, rows in zip(QKV, up.chunk(3), strict=True)
            for tensor, value in (("lora_up.weight", rows), ("lora_down.weight", down), ("alpha", t(2.0)))
        }
        readers = {"comfyui": (fused, split), "forge": (fused,), "kohya": (fused,), "lycoris": (fused,)}
        if family == "flux":
            readers |= {"diffusers": (fused,), "forge": (fused, split)}
        for loader, files in readers.items():
            for file in files:
                outcome = READERS[loader](write_adapter(tmp_path, file), QKV, family)
                assert all(near(outcome.deltas[name], expected[name]) for name in QKV)
                assert not outcome.ignored
        with pytest.raises(ValueError, match="fused"):
            READERS["comfyui"](write_adapter(tmp_path, fused), {next(iter(QKV)): torch.randn(3, 4)}, family)


def test_fused_norms_are_of_the_slice(tmp_path: Path) -> None:
    """In-axis DoRA of a slice takes the norm of the slice; of the fused layer, of the fused weight."""
    name = next(iter(QKV))
    tensors = {"lora_up.weight": torch.randn(3, 1), "lora_down.weight": torch.randn(1, 4), "alpha": t(1.0)}
    magnitude = torch.rand(1, 4) + 0.5
    file = write_adapter(
        tmp_path, keyed("lora_transformer_transformer_blocks_0_attn_to_q", {**tensors, "dora_scale": magnitude})
    )
    merged = QKV[name] + tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    for loader in ("comfyui", "forge"):
        delta = READERS[loader](file, QKV, "flux").deltas[name]
        assert near(delta, merged * magnitude / merged.norm(dim=0) - QKV[name])


def test_swapped_halves(tmp_path: Path) -> None:
    """norm_out.linear has scale and shift in the other order in the model's own layout."""
    weights = {"transformer.norm_out.linear": torch.randn(4, 2)}
    up, down = torch.randn(4, 1), torch.randn(1, 2)
    own = keyed("lora_unet_final_layer_adaLN_modulation_1", {"lora_up.weight": up, "lora_down.weight": down})
    theirs = keyed("transformer.norm_out.linear", {"lora_B.weight": up, "lora_A.weight": down})
    swapped = torch.cat([up[2:], up[:2]]) @ down
    assert near(READERS["comfyui"](write_adapter(tmp_path, own), weights, "flux").deltas.popitem()[1], swapped)
    assert near(READERS["comfyui"](write_adapter(tmp_path, theirs), weights, "flux").deltas.popitem()[1], up @ down)


def test_what_is_not_turned_with_swapped_halves(tmp_path: Path) -> None:
    """ComfyUI turns ΔW of its own weight, whose rows OFT and GLoRA mix before; Forge adds a whole ΔW as it is."""
    name = "transformer.norm_out.linear"
    weight, change = torch.randn(4, 2), torch.randn(4, 2)
    swap = [2, 3, 0, 1]
    whole = write_adapter(tmp_path, keyed("lora_transformer_norm_out_linear", {"diff": change}))
    assert near(READERS["comfyui"](whole, {name: weight}, "flux").deltas[name], change)
    assert near(READERS["forge"](whole, {name: weight}, "flux").deltas[name], change[swap])
    quarter = t([0.0, 0.5], [0.0, 0.0])  # R = ((.6, .8), (-.8, .6)), applied as Rᵀ to a block of two rows
    blocks = torch.stack([quarter, torch.zeros(2, 2)])
    file = write_adapter(tmp_path, keyed("lora_transformer_norm_out_linear", {"oft_blocks": blocks}))
    turned = t([0.6, -0.8], [0.8, 0.6]) @ weight[2:] - weight[2:]  # rows 2 and 3 are the first two of ComfyUI's
    expected = torch.cat([turned, torch.zeros(2, 2)])
    assert near(READERS["comfyui"](file, {name: weight}, "flux").deltas[name], expected)


def test_every_place_is_its_own() -> None:
    for table in dit_names.TABLES.values():
        places = [(place.module, place.part) for place in table.values()]
        assert len(set(places)) == len(places)


def test_a1111_with_sd3(tmp_path: Path) -> None:
    """Diffusers' names only, parted at the last two dots; q, k, v together."""
    tensors = {
        f"{name}.lora_{letter}.weight": tensor
        for name in QKV
        for letter, tensor in (("A", torch.ones(1, 4)), ("B", torch.ones(3, 1)))
    }
    assert READERS["a1111"](write_adapter(tmp_path, tensors), QKV, "sd3").deltas.keys() == QKV.keys()
    first = {key: tensor for key, tensor in tensors.items() if "to_q" in key}
    assert not READERS["a1111"](write_adapter(tmp_path, first), QKV, "sd3").deltas
    with pytest.raises(Refused, match="two dots"):
        READERS["a1111"](write_adapter(tmp_path, {**tensors, "lora_unet_x.alpha": UP}), QKV, "sd3")


def test_generic_models(tmp_path: Path) -> None:
    weights = {"block.layer": BASE}
    accepted = {
        "lycoris": ["lycoris_block_layer"],
        "comfyui": ["lora_unet_block_layer", "diffusion_model.block.layer"],
    }
    names = [name for own in accepted.values() for name in own]
    for name in names:
        file = write_adapter(tmp_path, keyed(name, {**LORA, "alpha": t(1.0)}))
        for loader in ("lycoris", "comfyui", "forge", "a1111", "kohya"):
            outcome = READERS[loader](file, weights, None)
            assert bool(outcome.deltas) == (name in accepted.get(loader, ()))
            assert bool(outcome.ignored) != bool(outcome.deltas)
        with pytest.raises(Refused):
            READERS["diffusers"](file, weights, None)


def test_kohya_oft_is_of_one_size(tmp_path: Path) -> None:
    """The first module's number of blocks is every module's."""
    blocks = {LINEAR: torch.randn(2, 2, 2), POINT: torch.randn(4, 1, 1)}
    tensors = {
        key: tensor
        for name, own in blocks.items()
        for key, tensor in keyed(
            kohya_key(name).replace("lora_unet_", "oft_unet_"), {"oft_blocks": own, "alpha": t(1e3)}
        ).items()
    }
    with pytest.raises(Refused, match="blocks"):
        READERS["kohya"](
            write_adapter(tmp_path, tensors), {LINEAR: torch.randn(4, 3), POINT: torch.randn(4, 3, 1, 1)}, "sd15"
        )


def test_a1111_pads_four_channels_to_nine(tmp_path: Path) -> None:
    """conv_in of an inpainting model."""
    weights = {"unet.conv_in": torch.randn(3, 9, 1, 1)}
    delta = torch.randn(3, 4, 1, 1)
    found = READERS["a1111"](write_adapter(tmp_path, {"lora_unet_conv_in.diff": delta}), weights, "sd15").deltas[
        "unet.conv_in"
    ]
    assert near(found[:, :4], delta)
    assert not found[:, 4:].any()


def test_a_1x1_factor_on_a_kernel(tmp_path: Path) -> None:
    """Added in place, it spreads over the kernel in A1111 and kohya; elsewhere it does not fit."""
    weights = {CONV: torch.randn(3, 2, 3, 3)}
    factors = {"lora_up.weight": torch.randn(3, 1, 1, 1), "lora_down.weight": torch.randn(1, 2, 1, 1), "alpha": t(1.0)}
    file = write_adapter(tmp_path, keyed(kohya_key(CONV), factors))
    spread = (factors["lora_up.weight"].flatten(1) @ factors["lora_down.weight"].flatten(1))[..., None, None]
    for loader in ("a1111", "kohya"):
        assert near(READERS[loader](file, weights, "sd15").deltas[CONV], spread.expand(3, 2, 3, 3))
    assert not READERS["comfyui"](file, weights, "sd15").deltas
    for loader in ("forge", "diffusers"):
        with pytest.raises(Refused):
            READERS[loader](file, weights, "sd15")


def test_unknown_names_and_families_are_errors(tmp_path: Path) -> None:
    """Of the test that calls, not verdicts of a loader."""
    file = write_adapter(tmp_path, keyed(kohya_key(LINEAR), LORA))
    for weights, family in (({"unet.conv_inn": BASE}, "sd15"), ({"conv_in": BASE}, "sd15"), ({LINEAR: BASE}, "sd1")):
        with pytest.raises(ValueError, match=r"conv_in|sd1"):
            READERS["comfyui"](file, weights, family)


def test_the_readers_know_nothing_of_the_library() -> None:
    sources = sorted((ROOT / "tests/support/readers").glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        assert "peftkit" not in source.read_text(encoding="utf-8"), source.name
