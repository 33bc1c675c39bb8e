"""The readers of tests/support/readers against hand-made files, the installed LyCORIS and PEFT, and what was measured.

A reader is an oracle only if something else than the code it judges says it is right: arithmetic done by hand here, the
real module's forward where the package is installed, and for the webuis the table of which loader agrees with which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris import create_lycoris_from_weights
from lycoris.functional.general import factorization as lycoris_factorization
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris.modules.tlora import TLoraModule
from peft.tuners.lokr.layer import factorization as peft_factorization
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.paths import ROOT
from tests.support.readers import READERS, Read, Refused, dit_names, unet_names
from tests.support.readers.lycoris import factorization as read_factorization
from tests.support.readers.peft import factorization as read_peft_factorization

TOLERANCE = 1e-5
WEBUIS = ("lycoris", "comfyui", "a1111", "forge", "kohya", "diffusers")


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    file = path / "adapter.safetensors"
    save_file(
        {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()},
        file,
        metadata,
    )
    return file


def t(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() < tolerance)


# By hand --------------------------------------------------------------------------------------------------------------

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
POINT = "unet.down_blocks.0.attentions.0.proj_in"
CONV = "unet.down_blocks.0.resnets.0.conv1"
NORM = "unet.down_blocks.0.resnets.0.norm1"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def kohya(name: str) -> str:
    """lora_unet_ or lora_te_ and the path, the name every loader takes for SD1.5."""
    component, _, path = name.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + path.replace(".", "_")


def keyed(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


UP, DOWN = t([1.0], [2.0]), t([3.0, 4.0])
PRODUCT = t([3.0, 4.0], [6.0, 8.0])
BASE = t([3.0, 0.0], [0.0, 4.0])
TURN = t([0.0, 0.5], [0.0, 0.0])  # Q = ((0, .5), (-.5, 0)): R = ((.6, .8), (-.8, .6)), applied as Rᵀ


@dataclass
class Hand:
    """A file of one module worked out by hand: what each loader makes of it, or the word of its refusal."""

    label: str
    tensors: Mapping[str, Tensor]
    expected: Mapping[str, Tensor | str | None]  # a tensor, a refusal's words, or None: nothing happens
    weight: Tensor = BASE
    strength: float = 1.0


ALL = {"a1111", "comfyui", "forge", "kohya", "lycoris", "diffusers"}
LORA = {"lora_up.weight": UP, "lora_down.weight": DOWN}


def each(**by_loader: Any) -> dict[str, Any]:
    """by_loader, with `rest` for the others."""
    rest = by_loader.pop("rest", None)
    return {loader: by_loader.get(loader, rest) for loader in ALL}


HANDS = [
    Hand("alpha 2 of rank 1", {**LORA, "alpha": torch.tensor(2.0)}, each(rest=2 * PRODUCT)),
    Hand("alpha [1]", {**LORA, "alpha": t(2.0)}, each(rest=2 * PRODUCT)),
    Hand("strength", {**LORA, "alpha": torch.tensor(1.0)}, each(rest=0.5 * PRODUCT), strength=0.5),
    Hand("no alpha", LORA, each(rest=PRODUCT, lycoris="TypeError")),
    Hand("alpha 0", {**LORA, "alpha": torch.tensor(0.0)}, each(lycoris=PRODUCT, kohya=PRODUCT)),
    Hand(
        "scale beside alpha",
        {**LORA, "alpha": torch.tensor(2.0), "scale": torch.tensor(5.0)},
        each(rest=2 * PRODUCT, a1111=5 * PRODUCT, diffusers="not correctly renamed"),
    ),
    Hand(
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
    Hand(
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
    Hand(
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
    Hand(
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
    Hand(
        "LoKr full, alpha ignored",
        {"lokr_w1": t([2.0]), "lokr_w2": PRODUCT, "alpha": torch.tensor(0.5)},
        each(rest=2 * PRODUCT, kohya=None, diffusers="not correctly renamed"),
    ),
    Hand(
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
    Hand("diff", {"diff": PRODUCT}, each(rest=0.5 * PRODUCT, kohya=None, diffusers="not correctly"), strength=0.5),
    Hand(
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
    Hand(
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
    Hand(
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
    Hand(
        "(IA)³ per output",
        {"weight": t(2.0, 3.0), "on_input": torch.tensor(0)},
        each(
            a1111=0.5 * t([6.0, 0.0], [0.0, 12.0]),
            lycoris="takes one tensor",
            diffusers="not correctly renamed",
        ),
        strength=0.5,
    ),
    Hand(
        "(IA)³ per input",
        {"weight": t(2.0, 3.0), "on_input": torch.tensor(1)},
        each(
            a1111=t([3.0, 3.0], [6.0, 6.0]),
            lycoris="takes one tensor",
            diffusers="not correctly renamed",
        ),
        weight=t([1.5, 1.0], [3.0, 2.0]),
    ),
    Hand(
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
    Hand(
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
    Hand(
        "only alpha",
        {"alpha": torch.tensor(1.0)},
        each(
            a1111="no module type",
            lycoris="no module type",
            diffusers="not correctly renamed",
        ),
    ),
    Hand("only dora_scale", {"dora_scale": t([1.0], [1.0])}, each(a1111="no module type", lycoris="no module type")),
    Hand(
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
    Hand(
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
    Hand(
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
    Hand(
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
    Hand(
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
    Hand(
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
def test_by_hand(hand: Hand, loader: str, tmp_path: Path) -> None:
    module = kohya(LINEAR)
    if loader == "kohya" and "oft_blocks" in hand.tensors:
        module = module.replace("lora_unet_", "oft_unet_")
    file = write(tmp_path, keyed(module, hand.tensors))
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
        assert close(outcome.deltas[LINEAR], expected)
        assert outcome.deltas[LINEAR].dtype == torch.float64


def test_ignored_and_biases(tmp_path: Path) -> None:
    bias = t(1.0, 2.0)
    beside = {**keyed(kohya(LINEAR), {**LORA, "alpha": torch.tensor(1.0), "diff_b": bias}), "lora_unet_x.alpha": bias}
    with_bias = {f"{kohya(LINEAR)}.diff_b", "lora_unet_x.alpha"}
    weights = {LINEAR: BASE}
    for loader, biases in {"a1111": {}, "comfyui": {LINEAR: bias}, "forge": {LINEAR: bias}}.items():
        outcome = READERS[loader](write(tmp_path, beside), weights, "sd15")
        assert outcome.biases.keys() == biases.keys()
        assert all(torch.equal(outcome.biases[name].float(), biases[name]) for name in biases)
        assert set(outcome.ignored) == (with_bias if not biases else {"lora_unet_x.alpha"})
    alone = write(tmp_path, keyed(kohya(LINEAR), {"diff_b": bias}))
    with pytest.raises(Refused):
        READERS["a1111"](alone, weights, "sd15")
    for loader in ("comfyui", "forge"):
        outcome = READERS[loader](alone, weights, "sd15", 0.5)
        assert not outcome.deltas
        assert torch.equal(outcome.biases[LINEAR].float(), bias / 2)
    norm = write(tmp_path, keyed(kohya(NORM), {"w_norm": bias, "b_norm": bias}))
    for loader in ("a1111", "comfyui", "forge", "lycoris"):
        outcome = READERS[loader](norm, {NORM: torch.ones(2)}, "sd15", 0.5)
        assert torch.equal(outcome.deltas[NORM].float(), bias / 2)
        assert torch.equal(outcome.biases[NORM].float(), bias / 2)
    full = write(tmp_path, keyed(kohya(LINEAR), {"diff": PRODUCT, "diff_b": bias}))
    for loader in ("a1111", "comfyui", "forge", "lycoris"):
        assert torch.equal(READERS[loader](full, weights, "sd15").biases[LINEAR].float(), bias)


def test_forge_refuses_more_than_twelve_leftovers(tmp_path: Path) -> None:
    fits = keyed(kohya(LINEAR), {**LORA, "alpha": torch.tensor(1.0)})
    for count in (12, 13):
        file = write(tmp_path, {**fits, **{f"lora_unet_x{n}.alpha": UP for n in range(count)}})
        if count > 12:
            with pytest.raises(Refused, match="13 tensors"):
                READERS["forge"](file, {LINEAR: BASE}, "sd15")
        else:
            assert len(READERS["forge"](file, {LINEAR: BASE}, "sd15").ignored) == count


def test_last_adapter_wins_in_comfyui_and_the_first_in_a1111(tmp_path: Path) -> None:
    both = {**LORA, "alpha": torch.tensor(1.0), "lokr_w1": t([2.0]), "lokr_w2": PRODUCT}
    file = write(tmp_path, keyed(kohya(LINEAR), both))
    for loader, factor in {"a1111": 1, "lycoris": 1, "comfyui": 2, "forge": 2, "kohya": 1}.items():
        assert close(READERS[loader](file, {LINEAR: BASE}, "sd15").deltas[LINEAR], factor * PRODUCT)
    file = write(tmp_path, keyed(kohya(LINEAR), {**both, "diff": 5 * PRODUCT}))
    for loader in ("comfyui", "forge"):
        outcome = READERS[loader](file, {LINEAR: BASE}, "sd15")
        assert close(outcome.deltas[LINEAR], 5 * PRODUCT)
        assert f"{kohya(LINEAR)}.lokr_w2" in outcome.ignored


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
        module = kohya(LINEAR)
        file = write(tmp_path, {up.format(module): UP, down.format(module): DOWN})
        comfyui = READERS["comfyui"](file, {LINEAR: BASE}, "sd15")
        forge = READERS["forge"](file, {LINEAR: BASE}, "sd15")
        assert close(comfyui.deltas[LINEAR], PRODUCT)
        assert not comfyui.ignored
        assert bool(forge.deltas) == (number < 5)


def test_diffusers_loses_the_alphas_of_attention(tmp_path: Path) -> None:
    """Most layers have alpha 2; to_q, with 1, gets 2 as well; the feed-forward layer keeps its own."""
    weights = {QUERY: torch.zeros(4, 4), KEY: torch.zeros(4, 4), POINT: torch.zeros(4, 4), LINEAR: torch.zeros(4, 4)}
    alphas = {QUERY: 1.0, KEY: 2.0, POINT: 2.0, LINEAR: 1.0}
    factors = {"lora_up.weight": torch.rand(4, 4), "lora_down.weight": torch.rand(4, 4)}
    product = factors["lora_up.weight"] @ factors["lora_down.weight"]
    tensors = {k: v for n, a in alphas.items() for k, v in keyed(kohya(n), {**factors, "alpha": t(a)}).items()}
    deltas = READERS["diffusers"](write(tmp_path, tensors), weights, "sd15").deltas
    for name, alpha in {**alphas, QUERY: 2.0}.items():
        assert close(deltas[name], product * alpha / 4)


# LyCORIS --------------------------------------------------------------------------------------------------------------

OUT, INTO = 24, 16
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(INTO, OUT),
    "conv1": lambda: nn.Conv2d(INTO, OUT, 1),
    "conv3": lambda: nn.Conv2d(INTO, OUT, 3),
    "conv1d": lambda: nn.Conv1d(INTO, OUT, 3),
    "conv3d": lambda: nn.Conv3d(INTO, OUT, 2),
}
NAMES = {"linear": LINEAR, "conv1": POINT, "conv3": CONV, "conv1d": CONV, "conv3d": CONV}


def written(cls: type, layer: nn.Module, **options: Any) -> Any:
    """A LyCORIS module on `layer` with random parameters."""
    module = cls("layer", layer, **{"lora_dim": 2, "alpha": 1, **options})
    for name, parameter in module.named_parameters():
        if name == "dora_scale" or name == "rescale":
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(std=0.1 if name == "oft_blocks" else 0.4)
    if options.get("weight_decompose"):  # no parameter: (…).float() made it a plain tensor
        module.dora_scale.data.uniform_(0.5, 1.5)
    return module.eval()


def tensors_of(module: Any) -> dict[str, Tensor]:
    if isinstance(module, FullModule):  # before apply_to its state_dict is something else
        return {"diff": module.weight.data, "diff_b": module.bias.data}
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def forward_weight(forward: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """The weight a layer without padding computes with: what it makes of each unit input, less of none."""
    inputs = torch.eye(weight[0].numel()).reshape(-1, *weight.shape[1:])
    outputs = forward(inputs) - forward(torch.zeros_like(inputs))
    return outputs.flatten(1).mT.reshape(weight.shape)


def trained(module: Any, layer: Any, strength: float = 1.0) -> Tensor:
    """The change of the weight in the real module's forward."""
    module.multiplier = strength
    return forward_weight(module, layer.weight) - layer.weight.detach()


FORMS: dict[str, tuple[type, dict[str, Any]]] = {
    "LoCon": (LoConModule, {}),
    "LoCon rs_lora": (LoConModule, {"rs_lora": True}),
    "LoCon use_scalar": (LoConModule, {"use_scalar": True}),
    "LoCon Tucker": (LoConModule, {"use_tucker": True}),
    "LoHa": (LohaModule, {}),
    "LoHa Tucker": (LohaModule, {"use_tucker": True}),
    "LoKr w2 low-rank": (LokrModule, {"factor": 4, "lora_dim": 1, "alpha": 2}),
    "LoKr both low-rank": (LokrModule, {"factor": 4, "lora_dim": 1, "alpha": 2, "decompose_both": True}),
    "LoKr full": (LokrModule, {"factor": 4, "full_matrix": True}),
    "LoKr Tucker": (LokrModule, {"factor": 2, "lora_dim": 2, "use_tucker": True}),
    "DoRA per output": (LoConModule, {"weight_decompose": True}),
    "DoHa per output": (LohaModule, {"weight_decompose": True}),
    "DoKr per output": (LokrModule, {"factor": 4, "lora_dim": 1, "alpha": 2, "weight_decompose": True}),
    "DoRA per input": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "DoHa per input": (LohaModule, {"weight_decompose": True, "wd_on_out": False}),
    "DoKr per input": (
        LokrModule,
        {"factor": 4, "lora_dim": 1, "alpha": 2, "weight_decompose": True, "wd_on_out": False},
    ),
    "OFT": (DiagOFTModule, {"lora_dim": 4}),
    "OFT constrained": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}),
    "OFT rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 6}),
    "BOFT constrained": (ButterflyOFTModule, {"lora_dim": 6, "constraint": 0.01}),
    "BOFT rescaled": (ButterflyOFTModule, {"lora_dim": 6, "rescaled": True}),
    "(IA)³ per output": (IA3Module, {}),
    "(IA)³ per input": (IA3Module, {"train_on_input": True}),
    "GLoRA": (GLoRAModule, {}),
    "full": (FullModule, {}),
    "T-LoRA": (TLoraModule, {}),
}
TUCKER = ("conv3",)
# cell: same, differs, nothing (no layer changed), refused. Columns as WEBUIS: L, C, A, F, S, D
SAME, DIFFERS, NOTHING, REFUSED = "same", "differs", "nothing", "refused"


def row(cells: str) -> tuple[str, ...]:
    return tuple({"=": SAME, "≠": DIFFERS, "-": NOTHING, "x": REFUSED}[cell] for cell in cells.split())


ALIKE = ("linear", "conv1", "conv3")
AGREEMENT: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    #                                     L C A F S D
    ("LoCon", ALIKE, row("                = = = = = =")),
    ("LoCon Tucker", ("conv3",), row("    = = = = ≠ x")),
    ("LoCon rs_lora", ALIKE, row("        = = = = = =")),
    ("LoCon use_scalar", ALIKE, row("     = = = = = =")),
    ("LoHa", ALIKE, row("                 = = = = - x")),
    ("LoHa Tucker", ("conv3",), row("     = = = = - x")),
    ("LoKr w2 low-rank", ALIKE, row("     = = = = - x")),
    ("LoKr both low-rank", ALIKE, row("   = = = = - x")),
    ("LoKr full", ALIKE, row("            = = = = - x")),
    ("LoKr Tucker", ("conv3",), row("     x - = x - x")),
    ("DoRA per output", ALIKE, row("      = ≠ ≠ ≠ ≠ ≠")),
    ("DoHa per output", ALIKE, row("      = ≠ ≠ ≠ - x")),
    ("DoKr per output", ALIKE, row("      = ≠ ≠ ≠ - x")),
    ("DoRA per input", ALIKE, row("       x = = = ≠ ≠")),
    ("DoHa per input", ALIKE, row("       x = = = - x")),
    ("DoKr per input", ALIKE, row("       x = = = - x")),
    ("OFT", ALIKE, row("                  = = = - - x")),
    ("OFT constrained", ALIKE, row("      = ≠ = - = x")),
    ("OFT rescaled", ALIKE, row("         = ≠ = - - x")),
    ("BOFT", ALIKE, row("                 = = = - x x")),
    ("BOFT rescaled", ALIKE, row("        = = = - x x")),
    ("(IA)³ per output", ("linear",), row("x - = - - x")),
    ("(IA)³ per output", ("conv3",), row(" x - - - - x")),
    ("(IA)³ per input", ALIKE, row("      x - = - - x")),
    ("GLoRA", ALIKE, row("                = = - = - x")),
    ("full", ALIKE, row("                 = = = = - x")),
    ("T-LoRA", ("linear",), row("         = - x - - x")),
    # the other convolutions
    ("LoCon", ("conv1d", "conv3d"), row(" = = x = x =")),
    ("LoCon Tucker", ("conv1d", "conv3d"), row("= x x x x x")),
    ("LoHa", ("conv1d", "conv3d"), row("  = = = = - x")),
    ("LoHa Tucker", ("conv1d", "conv3d"), row("= x - x - x")),
    ("LoKr w2 low-rank", ("conv1d",), row("= = = = - x")),
    ("LoKr full", ("conv1d", "conv3d"), row("= ≠ - ≠ - x")),
]
STRENGTH: list[tuple[str, tuple[str, ...]]] = [  # at 0.7, Linear
    #                          L C A F S D
    ("LoCon", row("            = = = = = =")),
    ("LoHa", row("             = = = = - x")),
    ("LoKr w2 low-rank", row(" = = = = - x")),
    ("DoRA per output", row("  = ≠ ≠ ≠ ≠ ≠")),
    ("DoRA per input", row("   x ≠ ≠ ≠ ≠ ≠")),
    ("OFT", row("              = ≠ = - - x")),
    ("OFT constrained", row("  = ≠ = - = x")),
    ("OFT rescaled", row("     = ≠ ≠ - - x")),
    ("BOFT", row("             = ≠ ≠ - x x")),
    ("BOFT rescaled", row("    = ≠ ≠ - x x")),
    ("(IA)³ per input", row("  x - = - - x")),
    ("GLoRA", row("            = = - = - x")),
    ("full", row("             = = = = - x")),
]


def verdict(loader: str, file: Path, name: str, weight: Tensor, delta: Tensor, strength: float) -> str:
    try:
        outcome = READERS[loader](file, {name: weight}, "sd15", strength)
    except Refused:
        return REFUSED
    if not outcome.deltas or float(outcome.deltas[name].abs().max()) < 1e-6:
        return NOTHING
    return SAME if close(outcome.deltas[name], delta) else DIFFERS


def cells(form: str, kind: str, strength: float, path: Path) -> tuple[str, ...]:
    layer, name = LAYERS[kind](), NAMES[kind]
    cls, options = FORMS[form]
    module = written(cls, layer, **options)
    delta = trained(module, layer, strength)
    assert float(delta.abs().max()) > 1e-2
    found = []
    for loader in WEBUIS:
        key = kohya(name)
        if loader == "kohya" and cls in (DiagOFTModule, ButterflyOFTModule):
            key = key.replace("lora_unet_", "oft_unet_")
        file = write(path, keyed(key, tensors_of(module)))
        found.append(verdict(loader, file, name, layer.weight.detach(), delta, strength))
    return tuple(found)


@pytest.mark.parametrize(
    ("form", "kind", "expected"),
    [(form, kind, expected) for form, kinds, expected in AGREEMENT for kind in kinds],
)
def test_agreement(form: str, kind: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    """Which loader makes of a LyCORIS file what its writer's forward did, at strength 1."""
    assert dict(zip(WEBUIS, cells(form, kind, 1.0, tmp_path), strict=True)) == dict(zip(WEBUIS, expected, strict=True))


@pytest.mark.parametrize(("form", "expected"), STRENGTH)
def test_agreement_at_another_strength(form: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    found = cells(form, "linear", 0.7, tmp_path)
    assert dict(zip(WEBUIS, found, strict=True)) == dict(zip(WEBUIS, expected, strict=True))


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.layer = layer


def reloaded(tensors: Mapping[str, Tensor], layer: nn.Module, strength: float) -> Tensor | None:
    """The change of the weight after the real loader, or None if it raises."""
    net = Net(layer)
    try:
        network, _ = create_lycoris_from_weights(strength, "", net, dict(keyed("lycoris_block_layer", tensors)))
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return None
    return trained(network.loras[0], layer, strength)


def agree_with_lycoris(tensors: Mapping[str, Tensor], layer: Any, strength: float, path: Path) -> bool:
    """Whether the reader and the real loader say the same; True where both load."""
    real = reloaded(tensors, layer, strength)
    file = write(path, keyed("lycoris_block_layer", tensors))
    weights = {"block.layer": layer.weight.detach()}
    if real is None:
        with pytest.raises(Refused):
            READERS["lycoris"](file, weights, None, strength)
        return False
    outcome = READERS["lycoris"](file, weights, None, strength)
    assert close(outcome.deltas.get("block.layer", torch.zeros_like(layer.weight)), real, 2e-5)
    return True


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("kind", LAYERS)
def test_lycoris_reloads_its_files(kind: str, strength: float, tmp_path: Path) -> None:
    """Every form, as its module writes it, without alpha, with alpha 0, transposed, cut short: same result or no."""
    loaded = 0
    for form, (cls, options) in FORMS.items():
        if form == "T-LoRA" and kind != "linear":
            continue
        layer = LAYERS[kind]()
        tensors = tensors_of(written(cls, layer, **options))
        loaded += agree_with_lycoris(tensors, layer, strength, tmp_path)
        if strength == 1:
            continue
        without = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
        agree_with_lycoris(without, layer, strength, tmp_path)
        if "alpha" in tensors:
            agree_with_lycoris({**tensors, "alpha": torch.tensor(0.0)}, layer, strength, tmp_path)
        for name, tensor in tensors.items():
            agree_with_lycoris({k: v for k, v in tensors.items() if k != name}, layer, strength, tmp_path)
            if tensor.ndim > 1:
                agree_with_lycoris({**tensors, name: tensor.transpose(0, 1)}, layer, strength, tmp_path)
                agree_with_lycoris({**tensors, name: tensor[:1]}, layer, strength, tmp_path)
    assert loaded > 15


def test_lycoris_lokr_of_any_shape(tmp_path: Path) -> None:
    """Which splits and ranks reload is lycoris' own logic of factors; every split of 24 × 16 with every form."""
    loaded = 0
    layer = nn.Linear(INTO, OUT)
    for a in (1, 2, 3, 4, 6, 8, 12):
        for c in (1, 2, 4, 8):
            b, d = OUT // a, INTO // c
            for rank in (1, 2, 4):
                first = {"lokr_w1": torch.randn(a, c)}
                first_low = {"lokr_w1_a": torch.randn(a, rank), "lokr_w1_b": torch.randn(rank, c)}
                second = {"lokr_w2": torch.randn(b, d)}
                second_low = {"lokr_w2_a": torch.randn(b, rank), "lokr_w2_b": torch.randn(rank, d)}
                for w1 in (first, first_low):
                    for w2 in (second, second_low):
                        tensors = {**w1, **w2, "alpha": torch.tensor(3.0)}
                        loaded += agree_with_lycoris(tensors, layer, 1.0, tmp_path)
    assert loaded > 20


def test_lycoris_norm(tmp_path: Path) -> None:
    layer = nn.LayerNorm(8)
    module = NormModule("layer", layer)
    module.w_norm.data.normal_()
    module.b_norm.data.normal_()
    file = write(tmp_path, keyed("lycoris_block_layer", tensors_of(module)))
    outcome = READERS["lycoris"](file, {"block.layer": layer.weight.detach()}, None, 0.5)
    network, _ = create_lycoris_from_weights(0.5, str(file), Net(layer))
    x = torch.randn(3, 8)
    changed = nn.functional.layer_norm(
        x,
        (8,),
        layer.weight + outcome.deltas["block.layer"].float(),
        layer.bias + outcome.biases["block.layer"].float(),
    )
    assert close(network.loras[0](x), changed)


def test_factorizations() -> None:
    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 8, 12, 16, 64):
            assert read_factorization(size, factor) == lycoris_factorization(size, factor)
            assert read_peft_factorization(size, factor) == peft_factorization(size, factor)


def test_lycoris_silently_ignores_other_names(tmp_path: Path) -> None:
    tensors = {**keyed("lora_unet_block_layer", LORA), **keyed("lycoris_other", LORA)}
    outcome = READERS["lycoris"](write(tmp_path, tensors), {"block.layer": BASE}, None)
    assert outcome == Read({}, {}, sorted(tensors))


# PEFT -----------------------------------------------------------------------------------------------------------------


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
    assert all(close(outcome.deltas[name], weights[name]) for name in weights)
    assert all(close(outcome.biases[name], biases[name]) for name in biases)
    assert not outcome.ignored


def test_peft_strength_of_oft_and_ia3(tmp_path: Path) -> None:
    base, change = saved_by_peft(PEFT_CONFIGS["OFT exact"](), tmp_path, 1.0)
    outcome = READERS["peft"](tmp_path, base, None, 0.5)
    assert all(close(outcome.deltas[name], change[name]) for name in change)
    saved_by_peft(PEFT_CONFIGS["IA3"](), tmp_path, 1.0)
    with pytest.raises(Refused, match="scale"):
        READERS["peft"](tmp_path, base, None, 0.5)


def directory(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    (path / "adapter_config.json").write_text(json.dumps(config))
    write(path, tensors).rename(path / "adapter_model.safetensors")
    return path


LORA_CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["layer"], "new_option": 1}
PEFT_LORA = {"base_model.model.block.layer.lora_A.weight": DOWN, "base_model.model.block.layer.lora_B.weight": UP}


def test_peft_by_hand(tmp_path: Path) -> None:
    read, weights = READERS["peft"], {"block.layer": BASE, "block.other": BASE}
    outcome = read(directory(tmp_path, LORA_CONFIG, PEFT_LORA), weights, None, 0.5)
    assert close(outcome.deltas["block.layer"], PRODUCT)
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


# Names ----------------------------------------------------------------------------------------------------------------


def unet_paths(family: str) -> list[str]:
    """Every module with a weight of the real U-Net, in diffusers' names."""
    depth = {"sd15": ((1, 1, 1, 0), 1, (0, 1, 1, 1)), "sdxl": ((0, 2, 10), 10, (10, 2, 0))}[family]
    cross = ("to_q", "to_k", "to_v", "to_out.0")

    def attention(name: str, layers: int) -> list[str]:
        inner = [f"attn{n}.{part}" for n in (1, 2) for part in cross]
        inner += ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
        blocks = [f"{name}.transformer_blocks.{n}.{part}" for n in range(layers) for part in inner]
        return [f"{name}.norm", f"{name}.proj_in", f"{name}.proj_out", *blocks]

    def resnet(name: str, shortcut: bool) -> list[str]:
        parts = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2", *(["conv_shortcut"] if shortcut else [])]
        return [f"{name}.{part}" for part in parts]

    paths = ["conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
    paths += ["add_embedding.linear_1", "add_embedding.linear_2"] if family == "sdxl" else []
    last = len(depth[0]) - 1
    for block, layers in enumerate(depth[0]):
        for n in range(2):
            paths += resnet(f"down_blocks.{block}.resnets.{n}", n == 0 and block in (1, 2))
            paths += attention(f"down_blocks.{block}.attentions.{n}", layers) if layers else []
        paths += [f"down_blocks.{block}.downsamplers.0.conv"] if block != last else []
    paths += resnet("mid_block.resnets.0", False) + resnet("mid_block.resnets.1", False)
    paths += attention("mid_block.attentions.0", depth[1])
    for block, layers in enumerate(depth[2]):
        for n in range(3):
            paths += resnet(f"up_blocks.{block}.resnets.{n}", True)
            paths += attention(f"up_blocks.{block}.attentions.{n}", layers) if layers else []
        paths += [f"up_blocks.{block}.upsamplers.0.conv"] if block != last else []
    return paths


def found(loader: str, names: Iterable[str], family: str, path: Path) -> set[str]:
    """The modules a loader finds of a file that names `names`[i] for the i-th weight; norms have LoRA here, too."""
    names = dict(zip(unet_paths(family), names, strict=True))
    tensors = {
        key: tensor
        for name in names.values()
        for key, tensor in keyed(name, {"lora_up.weight": UP, "lora_down.weight": DOWN, "alpha": torch.ones(1)}).items()
    }
    weights = {f"unet.{path}": BASE for path in names}
    outcome = READERS[loader](write(path, tensors), weights, family)
    return {name.removeprefix("unet.") for name in outcome.deltas}


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
    for loader in ("comfyui", "forge", "kohya", "lycoris"):
        assert found(loader, diffusers, family, tmp_path) == every
    assert found("a1111", diffusers, family, tmp_path) == every - ABSENT_IN_A1111[family]
    linear = {path for path in every if "norm" not in path}
    assert found("diffusers", diffusers, family, tmp_path) & linear == linear - ABSENT_IN_DIFFUSERS[family]
    for loader in ("comfyui", "forge", "a1111", "lycoris"):
        assert found(loader, ldm, family, tmp_path) == every
    assert found("kohya", ldm, family, tmp_path) == (every if family == "sdxl" else set())
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
    file, weights = write(tmp_path, tensors), {QUERY: BASE, KEY: BASE, LINEAR: BASE}
    assert READERS["diffusers"](file, weights, "sd15").deltas.keys() == weights.keys()
    assert READERS["comfyui"](file, weights, "sd15").deltas.keys() == {LINEAR}
    spelled = {key.replace("attn1.to_", "attn1.processor.to_"): tensor for key, tensor in tensors.items()}
    assert READERS["comfyui"](write(tmp_path, spelled), weights, "sd15").deltas.keys() == weights.keys()


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
        assert READERS[loader](write(tmp_path, every), weights, family).deltas.keys() == whole.keys()
    for loader in ("comfyui", "forge", "kohya", "lycoris"):
        assert READERS[loader](write(tmp_path, tensors), weights, family).deltas.keys() == names.keys()
    alone = READERS["a1111"](write(tmp_path, tensors), weights, family)
    assert alone.deltas.keys() == ({next(iter(names))} if family != "sd2" else set())
    with pytest.raises(Refused, match="infer"):  # no to_out and no mlp to tell the format from
        READERS["diffusers"](write(tmp_path, tensors), weights, family)


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
        readers = {"comfyui": (fused, split), "forge": (fused, split), "kohya": (fused,), "lycoris": (fused,)}
        if family == "flux":
            readers["diffusers"] = (fused,)
        for loader, files in readers.items():
            for file in files:
                outcome = READERS[loader](write(tmp_path, file), QKV, family)
                assert all(close(outcome.deltas[name], expected[name]) for name in QKV)
                assert not outcome.ignored
        with pytest.raises(ValueError, match="fused"):
            READERS["comfyui"](write(tmp_path, fused), {next(iter(QKV)): torch.randn(3, 4)}, family)


def test_fused_norms_are_of_the_slice(tmp_path: Path) -> None:
    """In-axis DoRA of a slice takes the norm of the slice; of the fused layer, of the fused weight."""
    name = next(iter(QKV))
    tensors = {"lora_up.weight": torch.randn(3, 1), "lora_down.weight": torch.randn(1, 4), "alpha": t(1.0)}
    magnitude = torch.rand(1, 4) + 0.5
    file = write(
        tmp_path, keyed("lora_transformer_transformer_blocks_0_attn_to_q", {**tensors, "dora_scale": magnitude})
    )
    merged = QKV[name] + tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    for loader in ("comfyui", "forge"):
        delta = READERS[loader](file, QKV, "flux").deltas[name]
        assert close(delta, merged * magnitude / merged.norm(dim=0) - QKV[name])


def test_swapped_halves(tmp_path: Path) -> None:
    """norm_out.linear has scale and shift in the other order in the model's own layout."""
    weights = {"transformer.norm_out.linear": torch.randn(4, 2)}
    up, down = torch.randn(4, 1), torch.randn(1, 2)
    own = keyed("lora_unet_final_layer_adaLN_modulation_1", {"lora_up.weight": up, "lora_down.weight": down})
    theirs = keyed("transformer.norm_out.linear", {"lora_B.weight": up, "lora_A.weight": down})
    swapped = torch.cat([up[2:], up[:2]]) @ down
    assert close(READERS["comfyui"](write(tmp_path, own), weights, "flux").deltas.popitem()[1], swapped)
    assert close(READERS["comfyui"](write(tmp_path, theirs), weights, "flux").deltas.popitem()[1], up @ down)


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
    assert READERS["a1111"](write(tmp_path, tensors), QKV, "sd3").deltas.keys() == QKV.keys()
    first = {key: tensor for key, tensor in tensors.items() if "to_q" in key}
    assert not READERS["a1111"](write(tmp_path, first), QKV, "sd3").deltas
    with pytest.raises(Refused, match="two dots"):
        READERS["a1111"](write(tmp_path, {**tensors, "lora_unet_x.alpha": UP}), QKV, "sd3")


def test_generic_models(tmp_path: Path) -> None:
    weights = {"block.layer": BASE}
    accepted = {
        "lycoris": ["lycoris_block_layer"],
        "comfyui": ["lora_unet_block_layer", "diffusion_model.block.layer"],
    }
    names = [name for own in accepted.values() for name in own]
    for name in names:
        file = write(tmp_path, keyed(name, {**LORA, "alpha": t(1.0)}))
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
            kohya(name).replace("lora_unet_", "oft_unet_"), {"oft_blocks": own, "alpha": t(1e3)}
        ).items()
    }
    with pytest.raises(Refused, match="blocks"):
        READERS["kohya"](write(tmp_path, tensors), {LINEAR: torch.randn(4, 3), POINT: torch.randn(4, 3, 1, 1)}, "sd15")


def test_a1111_pads_four_channels_to_nine(tmp_path: Path) -> None:
    """conv_in of an inpainting model."""
    weights = {"unet.conv_in": torch.randn(3, 9, 1, 1)}
    delta = torch.randn(3, 4, 1, 1)
    found = READERS["a1111"](write(tmp_path, {"lora_unet_conv_in.diff": delta}), weights, "sd15").deltas["unet.conv_in"]
    assert close(found[:, :4], delta)
    assert not found[:, 4:].any()


def test_a_1x1_factor_on_a_kernel(tmp_path: Path) -> None:
    """Added in place, it spreads over the kernel in A1111 and kohya; elsewhere it does not fit."""
    weights = {CONV: torch.randn(3, 2, 3, 3)}
    factors = {"lora_up.weight": torch.randn(3, 1, 1, 1), "lora_down.weight": torch.randn(1, 2, 1, 1), "alpha": t(1.0)}
    file = write(tmp_path, keyed(kohya(CONV), factors))
    spread = (factors["lora_up.weight"].flatten(1) @ factors["lora_down.weight"].flatten(1))[..., None, None]
    for loader in ("a1111", "kohya"):
        assert close(READERS[loader](file, weights, "sd15").deltas[CONV], spread.expand(3, 2, 3, 3))
    assert not READERS["comfyui"](file, weights, "sd15").deltas
    for loader in ("forge", "diffusers"):
        with pytest.raises(Refused):
            READERS[loader](file, weights, "sd15")


def test_unknown_names_and_families_are_errors(tmp_path: Path) -> None:
    """Of the test that calls, not verdicts of a loader."""
    file = write(tmp_path, keyed(kohya(LINEAR), LORA))
    for weights, family in (({"unet.conv_inn": BASE}, "sd15"), ({"conv_in": BASE}, "sd15"), ({LINEAR: BASE}, "sd1")):
        with pytest.raises(ValueError, match=r"conv_in|sd1"):
            READERS["comfyui"](file, weights, family)


def test_the_readers_know_nothing_of_the_library() -> None:
    sources = sorted((ROOT / "tests/support/readers").glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        assert "peftkit" not in source.read_text(encoding="utf-8"), source.name
