"""The readers against the installed PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.support.by_hand import BASE, DOWN, KEY, PRODUCT, QUERY, UP, near, write_adapter
from tests.support.readers import READERS, Refused

# -- By hand -----------------------------------------------------------------------------------------------------------

TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


# -- PEFT --------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.linear = nn.Linear(16, 24)
        self.block.point = nn.Conv2d(16, 24, 1)
        self.block.conv = nn.Conv2d(8, 12, 3)
        self.block.line = nn.Conv1d(8, 12, 3)
        self.norm = nn.LayerNorm(4)


EVERY = ["linear", "point", "conv", "line"]
TWO = ["linear", "point", "conv"]
PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=2, lora_alpha=3, target_modules=EVERY),
    "rsLoRA, regex": lambda: peft.LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=r"block\.(linear|conv)"
    ),
    "patterns": lambda: peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=EVERY,
        rank_pattern={"linear": 4, "^block.conv": 1},
        alpha_pattern={"block.point": 5, "lin.": 7},
    ),
    "lora_bias": lambda: peft.LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=EVERY),
    "all-linear": lambda: peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"),
    "DoRA": lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=EVERY),
    "LoHa": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=EVERY, init_weights=False),
    "LoHa Tucker": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=EVERY, init_weights=False, use_effective_conv2d=True
    ),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=EVERY, init_weights=False),
    "LoKr full": lambda: peft.LoKrConfig(r=64, alpha=3, target_modules=EVERY, init_weights=False),
    "LoKr both": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=EVERY, init_weights=False, decompose_both=True, decompose_factor=4
    ),
    "LoKr factor above the root": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=EVERY, init_weights=False, decompose_factor=8
    ),
    "LoKr Tucker": lambda: peft.LoKrConfig(
        r=2, alpha=3, target_modules=EVERY, init_weights=False, use_effective_conv2d=True, decompose_factor=2
    ),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TWO, init_weights=False),
    "OFT exact": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=TWO, init_weights=False, use_cayley_neumann=False
    ),
    "OFT of r blocks, 3 terms": lambda: peft.OFTConfig(
        r=4, oft_block_size=0, target_modules=TWO, init_weights=False, num_cayley_neumann_terms=3
    ),
    "OFT shared, 7 terms": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=TWO, init_weights=False, block_share=True, num_cayley_neumann_terms=7
    ),
    "OFT constrained": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=TWO, init_weights=False, coft=True, eps=0.3, use_cayley_neumann=False
    ),
    "IA3": lambda: peft.IA3Config(target_modules=TWO, feedforward_modules=["conv"], init_ia3_weights=False),
}


def saved_by_peft(config: Any, path: Path, strength: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base (weights and biases by name) and what merging a random adapter at `strength` adds to it."""
    net = Small()
    base = {name.removesuffix(".weight"): tensor.detach().clone() for name, tensor in net.named_parameters()}
    model = peft.get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif any(mark in name for mark in ("lora_", "hada_", "lokr_", "oft_", "ia3_")):
            parameter.data.normal_(std=0.2 if "oft" in name else 0.5)
    model.save_pretrained(str(path))
    if strength != 1:
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.scale_layer(strength)
    merged = model.merge_and_unload()
    after = {name.removesuffix(".weight"): tensor.detach() for name, tensor in merged.named_parameters()}
    return base, {name: after[name] - base[name] for name in base if not torch.equal(after[name], base[name])}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT of its own lora_bias
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("label", PEFT_CONFIGS)
def test_peft(label: str, strength: float, tmp_path: Path) -> None:
    config = PEFT_CONFIGS[label]()
    if strength != 1 and label.startswith(("IA3", "OFT")):  # not supported there
        strength = 1.0
    base, change = saved_by_peft(config, tmp_path, strength)
    outcome = READERS["peft"](tmp_path, base, None, strength)
    weights = {name: delta for name, delta in change.items() if not name.endswith(".bias")}
    biases = {name.removesuffix(".bias"): delta for name, delta in change.items() if name.endswith(".bias")}
    assert len(weights) >= 2 or label == "all-linear"
    assert outcome.deltas.keys() == weights.keys()
    assert outcome.biases.keys() == biases.keys()
    assert all(near(outcome.deltas[name], weights[name]) for name in weights)
    assert all(near(outcome.biases[name], biases[name]) for name in biases)
    assert not outcome.ignored


def test_peft_strength_of_oft_and_ia3(tmp_path: Path) -> None:
    base, change = saved_by_peft(PEFT_CONFIGS["OFT exact"](), tmp_path, 1.0)
    outcome = READERS["peft"](tmp_path, base, None, 0.5)
    assert all(near(outcome.deltas[name], change[name]) for name in change)
    saved_by_peft(PEFT_CONFIGS["IA3"](), tmp_path, 1.0)
    with pytest.raises(Refused, match="scale"):
        READERS["peft"](tmp_path, base, None, 0.5)


def directory(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_adapter(path, tensors).rename(path / "adapter_model.safetensors")
    return path


LORA_CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["layer"], "new_option": 1}
PEFT_LORA = {"base_model.model.block.layer.lora_A.weight": DOWN, "base_model.model.block.layer.lora_B.weight": UP}


def test_peft_by_hand(tmp_path: Path) -> None:
    read, weights = READERS["peft"], {"block.layer": BASE, "block.other": BASE}
    outcome = read(directory(tmp_path, LORA_CONFIG, PEFT_LORA), weights, None, 0.5)
    assert near(outcome.deltas["block.layer"], PRODUCT)
    extra = {**PEFT_LORA, "base_model.model.block.other.lora_A.weight": DOWN, "block.layer.lora_A.weight": DOWN}
    outcome = read(directory(tmp_path, LORA_CONFIG, extra), weights, None)
    assert outcome.ignored == ["base_model.model.block.other.lora_A.weight", "block.layer.lora_A.weight"]
    halves = dict(zip(("A", "B"), ({key: tensor} for key, tensor in PEFT_LORA.items()), strict=True))
    assert not read(directory(tmp_path, LORA_CONFIG, halves["A"]), weights, None).deltas
    assert read(directory(tmp_path, LORA_CONFIG, halves["B"]), weights, None).deltas["block.layer"].isnan().all()
    for wrong, words in (({"r": 2}, "size mismatch"), ({"target_modules": ["layers"]}, "not found")):
        with pytest.raises(Refused, match=words):
            read(directory(tmp_path, {**LORA_CONFIG, **wrong}, PEFT_LORA), weights, None)
    with pytest.raises(NotImplementedError):
        read(directory(tmp_path, {"peft_type": "BOFT"}, {}), weights, None)


def test_peft_wraps_one_component(tmp_path: Path) -> None:
    path = directory(
        tmp_path,
        {**LORA_CONFIG, "target_modules": ["to_q"]},
        {
            f"base_model.model.{QUERY.removeprefix('unet.')}.lora_{letter}.weight": tensor
            for letter, tensor in (("A", DOWN), ("B", UP))
        },
    )
    outcome = READERS["peft"](path, {QUERY: BASE, KEY: BASE, TEXT: BASE}, "sd15")
    assert list(outcome.deltas) == [QUERY]
