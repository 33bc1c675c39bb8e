"""The family of an adapter is guessed from its names and shapes."""

from __future__ import annotations

from typing import Any

import pytest

from peftkit.files.families.names import Family, guess
from tests.support.classes import FAMILY, STYLES, shape, spellings


@FAMILY
@pytest.mark.parametrize("style", STYLES)
def test_a_whole_adapter_is_of_its_family(family: Family, style: str) -> None:
    spelled = [name for module, name in spellings(family, style) if len(module.shape) != 1]
    if spelled:
        assert guess({name: shape(family, name) for name in spelled})[0] is family


def _names(*arguments: Any) -> list[str]:
    return [family.name for family in guess(dict(*arguments))]


def test_shapes_decide_between_families_that_share_names() -> None:
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert _names({key: (640, 768)}) == ["sd15"]
    assert _names({key: (640, 1024)}) == ["sd2"]
    assert _names({key: (640, 2048)}) == ["sdxl", "kolors"]  # which differ in one layer
    assert _names({key: (640, 512)}) == []
    assert _names({key: None}) == ["sd15", "sd2", "sdxl", "kolors"]
    assert _names({key: (640, 768), "lora_unet_no_such": None}) == _names({}) == []


def test_the_usual_spelling_comes_first() -> None:
    assert _names({"lora_unet_input_blocks_4_1_proj_in": None})[0] == "sdxl"
    assert _names({"lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768)})[0] == "sd15"
    assert _names({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768)})[0] == "sdxl"
    assert _names({"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)}) == ["sd3", "sd35-medium"]
    assert _names({"lora_unet_joint_blocks_0_x_block_attn2_qkv": (4608, 1536)}) == ["sd35-medium"]
