"""The readers of tests/support/readers against hand-made files.

A reader is an oracle only if something else than the code it judges says it is right: arithmetic done by hand here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.by_hand import (
    BASE,
    DOWN,
    KEY,
    LINEAR,
    LORA,
    POINT,
    PRODUCT,
    QUERY,
    UP,
    kohya_key,
    near,
    t,
    write_adapter,
)
from tests.support.files import keyed
from tests.support.readers import READERS, Refused

NORM = "unet.down_blocks.0.resnets.0.norm1"
TURN = t([0.0, 0.5], [0.0, 0.0])  # Q = ((0, .5), (-.5, 0)): R = ((.6, .8), (-.8, .6)), applied as Rᵀ


@dataclass
class ByHand:
    """A file of one module worked out by hand: what each loader makes of it, or the word of its refusal."""

    label: str
    tensors: Mapping[str, Tensor]
    expected: Mapping[str, Tensor | str | None]  # a tensor, a refusal's words, or None: nothing happens
    weight: Tensor = BASE
    strength: float = 1.0


ALL = {"a1111", "comfyui", "forge", "kohya", "lycoris", "diffusers"}


def each(**by_loader: Any) -> dict[str, Any]:
    """by_loader, with `rest` for the others."""
    rest = by_loader.pop("rest", None)
    return {loader: by_loader.get(loader, rest) for loader in ALL}


HANDS = [
    ByHand("alpha 2 of rank 1", {**LORA, "alpha": torch.tensor(2.0)}, each(rest=2 * PRODUCT)),
    ByHand("alpha [1]", {**LORA, "alpha": t(2.0)}, each(rest=2 * PRODUCT)),
    ByHand("strength", {**LORA, "alpha": torch.tensor(1.0)}, each(rest=0.5 * PRODUCT), strength=0.5),
    ByHand("no alpha", LORA, each(rest=PRODUCT, lycoris="TypeError")),
    ByHand("alpha 0", {**LORA, "alpha": torch.tensor(0.0)}, each(lycoris=PRODUCT, kohya=PRODUCT)),
    ByHand(
        "scale beside alpha",
        {**LORA, "alpha": torch.tensor(2.0), "scale": torch.tensor(5.0)},
        each(rest=2 * PRODUCT, a1111=5 * PRODUCT, diffusers="not correctly renamed"),
    ),
    ByHand(
        "lora_A, lora_B",
        {"lora_A.weight": DOWN, "lora_B.weight": UP, "alpha": torch.tensor(2.0)},
        each(
            a1111=PRODUCT,
            comfyui=2 * PRODUCT,
            forge=2 * PRODUCT,
            lycoris="no module type",
            diffusers="not correctly renamed",
        ),
    ),
    ByHand(
        "DoRA per output, s = 1/2",
        # V = ((6, 4), (6, 12)), its rows √52 and √180, its columns √72 and √160; W's rows 3 and 4
        {**LORA, "alpha": torch.tensor(1.0), "dora_scale": t([6.0], [8.0])},
        each(
            lycoris=t([6.0, 4.0], [6.0, 12.0]) * (0.5 * (t([6.0 / 52**0.5], [8.0 / 180**0.5]) - 1) + 1) - BASE,
            comfyui=0.5 * (t([12.0, 8.0], [12.0, 24.0]) - BASE),
            forge=0.5 * (t([12.0, 8.0], [12.0, 24.0]) - BASE),
            a1111=0.5 * (t([36.0 / 72**0.5, 24.0 / 160**0.5], [48.0 / 72**0.5, 96.0 / 160**0.5]) - BASE),
            kohya=0.5 * PRODUCT,
            diffusers=0.5 * PRODUCT,
        ),
        strength=0.5,
    ),
    ByHand(
        "DoRA per input, s = 1/2",
        {**LORA, "alpha": torch.tensor(1.0), "dora_scale": t([6.0, 8.0])},
        each(
            rest=0.5 * (t([36.0 / 72**0.5, 32.0 / 160**0.5], [36.0 / 72**0.5, 96.0 / 160**0.5]) - BASE),
            lycoris="dora_scale",
            kohya=0.5 * PRODUCT,
            diffusers=0.5 * PRODUCT,
        ),
        strength=0.5,
    ),
    ByHand(
        "LoHa",  # (1, 2)ᵀ(3, 4) ∘ (1, 1)ᵀ(2, 1)
        {
            "hada_w1_a": UP,
            "hada_w1_b": DOWN,
            "hada_w2_a": t([1.0], [1.0]),
            "hada_w2_b": t([2.0, 1.0]),
            "alpha": torch.tensor(0.5),
        },
        each(rest=0.5 * t([6.0, 4.0], [12.0, 8.0]), kohya=None, diffusers="not correctly renamed"),
    ),
    ByHand(
        "LoKr full, alpha ignored",
        {"lokr_w1": t([2.0]), "lokr_w2": PRODUCT, "alpha": torch.tensor(0.5)},
        each(rest=2 * PRODUCT, kohya=None, diffusers="not correctly renamed"),
    ),
    ByHand(
        "LoKr of unequal ranks: the divisor is w2's",
        {
            "lokr_w1_a": t([1.0, 1.0]),
            "lokr_w1_b": t([1.0], [1.0]),
            "lokr_w2_a": UP,
            "lokr_w2_b": DOWN,
            "alpha": torch.tensor(3.0),
        },
        each(rest=6 * PRODUCT, lycoris="AttributeError", kohya=None, diffusers="not correctly renamed"),
    ),
    ByHand("diff", {"diff": PRODUCT}, each(rest=0.5 * PRODUCT, kohya=None, diffusers="not correctly"), strength=0.5),
    ByHand(
        "set_weight",
        {"set_weight": PRODUCT},
        each(
            comfyui=PRODUCT - BASE,
            forge=PRODUCT - BASE,
            a1111="no module type",
            lycoris="no module type",
            diffusers="not correctly renamed",
        ),
    ),
    ByHand(
        "OFT, s = 1/2",  # R − 1 = ((-.4, .8), (-.8, -.4)), transposed times W; comfyui: s²
        {"oft_blocks": TURN[None], "alpha": torch.tensor(0.0)},
        each(
            a1111=0.5 * t([-1.2, -3.2], [2.4, -1.6]),
            lycoris="oft_blocks is",
            comfyui=0.25 * t([-1.2, -3.2], [2.4, -1.6]),
            diffusers="not correctly renamed",
        ),
        strength=0.5,
    ),
    ByHand(
        "OFT without alpha",
        {"oft_blocks": TURN[None]},
        each(
            a1111=t([-1.2, -3.2], [2.4, -1.6]),
            comfyui=t([-1.2, -3.2], [2.4, -1.6]),
            lycoris="TypeError",
            kohya="KeyError",
            diffusers="not correctly renamed",
        ),
    ),
    ByHand(
        "(IA)³ per output",
        {"weight": t(2.0, 3.0), "on_input": torch.tensor(0)},
        each(
            a1111=0.5 * t([6.0, 0.0], [0.0, 12.0]),
            lycoris="takes one tensor",
            diffusers="not correctly renamed",
        ),
        strength=0.5,
    ),
    ByHand(
        "(IA)³ per input",
        {"weight": t(2.0, 3.0), "on_input": torch.tensor(1)},
        each(
            a1111=t([3.0, 3.0], [6.0, 6.0]),
            lycoris="takes one tensor",
            diffusers="not correctly renamed",
        ),
        weight=t([1.5, 1.0], [3.0, 2.0]),
    ),
    ByHand(
        "GLoRA, old layout: alpha only in ComfyUI and Forge",
        {
            "a1.weight": t([1.0, 2.0, 3.0], [0.0, 1.0, 0.0]),
            "a2.weight": t([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]),
            "b1.weight": t([1.0, 1.0, 1.0], [0.0, 2.0, 0.0]),
            "b2.weight": t([1.0, 0.0], [1.0, 1.0]),
            "alpha": torch.tensor(4.0),
        },
        each(
            a1111=t([4.0, 7.0, 10.0], [1.0, 7.0, 1.0]),
            comfyui=2 * t([4.0, 7.0, 10.0], [1.0, 7.0, 1.0]),
            forge=2 * t([4.0, 7.0, 10.0], [1.0, 7.0, 1.0]),
            lycoris="a1.weight is",
            diffusers="not correctly renamed",
        ),
        weight=t([3.0, 0.0, 1.0], [0.0, 4.0, 1.0]),
    ),
    ByHand(
        "only lora_up",
        {"lora_up.weight": UP},
        each(
            a1111="no module type",
            comfyui="KeyError",
            forge="KeyError",
            lycoris="lora_down",
            diffusers="not correctly",
        ),
    ),
    ByHand(
        "only alpha",
        {"alpha": torch.tensor(1.0)},
        each(
            a1111="no module type",
            lycoris="no module type",
            diffusers="not correctly renamed",
        ),
    ),
    ByHand("only dora_scale", {"dora_scale": t([1.0], [1.0])}, each(a1111="no module type", lycoris="no module type")),
    ByHand(
        "only w_norm",
        {"w_norm": t(1.0, 2.0)},
        each(
            a1111="no module type",
            comfyui=t(1.0, 2.0),
            forge=t(1.0, 2.0),
            lycoris=t(1.0, 2.0),
            diffusers="not correctly",
        ),
        weight=t(1.0, 1.0),
    ),
    ByHand(
        "diff on a norm",
        {"diff": t(1.0, 2.0)},
        each(
            a1111=t(1.0, 2.0),
            comfyui=t(1.0, 2.0),
            forge=t(1.0, 2.0),
            lycoris="norm layers",
            diffusers="not correctly",
        ),
        weight=t(1.0, 1.0),
    ),
    ByHand(
        "4-D factors on a Linear",
        {
            "lora_up.weight": UP[..., None, None],
            "lora_down.weight": DOWN[..., None, None],
            "alpha": torch.tensor(1.0),
        },
        each(
            a1111=PRODUCT,
            comfyui=PRODUCT,
            forge=PRODUCT,
            kohya="lora.py",
            lycoris="the module's is",
            diffusers="size mismatch",
        ),
    ),
    ByHand(
        "of the same size, garbled",
        {**LORA, "alpha": torch.tensor(1.0)},
        each(
            rest=t([3.0, 4.0, 6.0, 8.0]),
            kohya="lora.py",
            lycoris="the module's is",
            diffusers="size mismatch",
        ),
        weight=t([1.0, 2.0, 3.0, 4.0]),
    ),
    ByHand(
        "too few inputs",
        {**LORA, "alpha": torch.tensor(1.0)},
        each(
            forge=t([3.0, 4.0, 0.0], [6.0, 8.0, 0.0]),
            kohya="lora.py",
            lycoris="the module's is",
            diffusers="size mismatch",
        ),
        weight=torch.ones(2, 3),
    ),
    ByHand(
        "too many inputs",
        {**LORA, "alpha": torch.tensor(1.0)},
        each(
            forge="larger shape",
            kohya="lora.py",
            lycoris="the module's is",
            diffusers="size mismatch",
        ),
        weight=torch.ones(2, 1),
    ),
]


@pytest.mark.parametrize("loader", sorted(ALL))
@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.label)
def test_by_hand(hand: ByHand, loader: str, tmp_path: Path) -> None:
    module = kohya_key(LINEAR)
    if loader == "kohya" and "oft_blocks" in hand.tensors:
        module = module.replace("lora_unet_", "oft_unet_")
    file = write_adapter(tmp_path, keyed(module, hand.tensors))
    expected = hand.expected[loader]
    if isinstance(expected, str):
        with pytest.raises(Refused, match=re.escape(expected)):
            READERS[loader](file, {LINEAR: hand.weight}, "sd15", hand.strength)
        return
    outcome = READERS[loader](file, {LINEAR: hand.weight}, "sd15", hand.strength)
    if expected is None:  # OFT's clamp to 0 leaves 1e-8
        assert all(float(delta.abs().max()) < 1e-7 for delta in outcome.deltas.values())
    else:
        assert list(outcome.deltas) == [LINEAR]
        assert near(outcome.deltas[LINEAR], expected)
        assert outcome.deltas[LINEAR].dtype == torch.float64


def test_ignored_and_biases(tmp_path: Path) -> None:
    bias = t(1.0, 2.0)
    beside = {
        **keyed(kohya_key(LINEAR), {**LORA, "alpha": torch.tensor(1.0), "diff_b": bias}),
        "lora_unet_x.alpha": bias,
    }
    with_bias = {f"{kohya_key(LINEAR)}.diff_b", "lora_unet_x.alpha"}
    weights = {LINEAR: BASE}
    for loader, biases in {"a1111": {}, "comfyui": {LINEAR: bias}, "forge": {LINEAR: bias}}.items():
        outcome = READERS[loader](write_adapter(tmp_path, beside), weights, "sd15")
        assert outcome.biases.keys() == biases.keys()
        assert all(torch.equal(outcome.biases[name].float(), biases[name]) for name in biases)
        assert set(outcome.ignored) == (with_bias if not biases else {"lora_unet_x.alpha"})
    alone = write_adapter(tmp_path, keyed(kohya_key(LINEAR), {"diff_b": bias}))
    with pytest.raises(Refused):
        READERS["a1111"](alone, weights, "sd15")
    for loader in ("comfyui", "forge"):
        outcome = READERS[loader](alone, weights, "sd15", 0.5)
        assert not outcome.deltas
        assert torch.equal(outcome.biases[LINEAR].float(), bias / 2)
    norm = write_adapter(tmp_path, keyed(kohya_key(NORM), {"w_norm": bias, "b_norm": bias}))
    for loader in ("a1111", "comfyui", "forge", "lycoris"):
        outcome = READERS[loader](norm, {NORM: torch.ones(2)}, "sd15", 0.5)
        assert torch.equal(outcome.deltas[NORM].float(), bias / 2)
        assert torch.equal(outcome.biases[NORM].float(), bias / 2)
    full = write_adapter(tmp_path, keyed(kohya_key(LINEAR), {"diff": PRODUCT, "diff_b": bias}))
    for loader in ("a1111", "comfyui", "forge", "lycoris"):
        assert torch.equal(READERS[loader](full, weights, "sd15").biases[LINEAR].float(), bias)


def test_forge_refuses_more_than_twelve_leftovers(tmp_path: Path) -> None:
    fits = keyed(kohya_key(LINEAR), {**LORA, "alpha": torch.tensor(1.0)})
    for count in (12, 13):
        file = write_adapter(tmp_path, {**fits, **{f"lora_unet_x{n}.alpha": UP for n in range(count)}})
        if count > 12:
            with pytest.raises(Refused, match="13 tensors"):
                READERS["forge"](file, {LINEAR: BASE}, "sd15")
        else:
            assert len(READERS["forge"](file, {LINEAR: BASE}, "sd15").ignored) == count


def test_last_adapter_wins_in_comfyui_and_the_first_in_a1111(tmp_path: Path) -> None:
    both = {**LORA, "alpha": torch.tensor(1.0), "lokr_w1": t([2.0]), "lokr_w2": PRODUCT}
    file = write_adapter(tmp_path, keyed(kohya_key(LINEAR), both))
    for loader, factor in {"a1111": 1, "lycoris": 1, "comfyui": 2, "forge": 2, "kohya": 1}.items():
        assert near(READERS[loader](file, {LINEAR: BASE}, "sd15").deltas[LINEAR], factor * PRODUCT)
    file = write_adapter(tmp_path, keyed(kohya_key(LINEAR), {**both, "diff": 5 * PRODUCT}))
    for loader in ("comfyui", "forge"):
        outcome = READERS[loader](file, {LINEAR: BASE}, "sd15")
        assert near(outcome.deltas[LINEAR], 5 * PRODUCT)
        assert f"{kohya_key(LINEAR)}.lokr_w2" in outcome.ignored


def test_key_variants(tmp_path: Path) -> None:
    pairs = {
        "{}.lora_up.weight": "{}.lora_down.weight",
        "{}.lora_B.weight": "{}.lora_A.weight",
        "{}_lora.up.weight": "{}_lora.down.weight",
        "{}.lora.up.weight": "{}.lora.down.weight",
        "{}.lora_linear_layer.up.weight": "{}.lora_linear_layer.down.weight",
        "{}.lora_B": "{}.lora_A",
        "{}.lora_B.default.weight": "{}.lora_A.default.weight",
    }
    for number, (up, down) in enumerate(pairs.items()):
        module = kohya_key(LINEAR)
        file = write_adapter(tmp_path, {up.format(module): UP, down.format(module): DOWN})
        comfyui = READERS["comfyui"](file, {LINEAR: BASE}, "sd15")
        forge = READERS["forge"](file, {LINEAR: BASE}, "sd15")
        assert near(comfyui.deltas[LINEAR], PRODUCT)
        assert not comfyui.ignored
        assert bool(forge.deltas) == (number < 5)


def test_diffusers_loses_the_alphas_of_attention(tmp_path: Path) -> None:
    """Most layers have alpha 2; to_q, with 1, gets 2 as well; the feed-forward layer keeps its own."""
    weights = {QUERY: torch.zeros(4, 4), KEY: torch.zeros(4, 4), POINT: torch.zeros(4, 4), LINEAR: torch.zeros(4, 4)}
    alphas = {QUERY: 1.0, KEY: 2.0, POINT: 2.0, LINEAR: 1.0}
    factors = {"lora_up.weight": torch.rand(4, 4), "lora_down.weight": torch.rand(4, 4)}
    product = factors["lora_up.weight"] @ factors["lora_down.weight"]
    tensors = {k: v for n, a in alphas.items() for k, v in keyed(kohya_key(n), {**factors, "alpha": t(a)}).items()}
    deltas = READERS["diffusers"](write_adapter(tmp_path, tensors), weights, "sd15").deltas
    for name, alpha in {**alphas, QUERY: 2.0}.items():
        assert near(deltas[name], product * alpha / 4)
