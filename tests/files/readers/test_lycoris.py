"""The readers against the installed LyCORIS, and the table of which loader agrees with which.

A reader is an oracle only if something else than the code it judges says it is right: the real
module's forward, and for the webuis the table of agreement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn

from tests.support.by_hand import BASE, CONV, LINEAR, LORA, POINT, kohya_key, near, write_adapter
from tests.support.files import keyed
from tests.support.readers import READERS, Read, Refused
from tests.support.readers.lycoris import factorization as read_factorization
from tests.support.readers.peft import factorization as read_peft_factorization

WEBUIS = ("lycoris", "comfyui", "a1111", "forge", "kohya", "diffusers")


# -- LyCORIS -----------------------------------------------------------------------------------------------------------

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


def forward_delta(module: Any, layer: Any, strength: float = 1.0) -> Tensor:
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
    return SAME if near(outcome.deltas[name], delta) else DIFFERS


def cells(form: str, kind: str, strength: float, path: Path) -> tuple[str, ...]:
    layer, name = LAYERS[kind](), NAMES[kind]
    cls, options = FORMS[form]
    module = written(cls, layer, **options)
    delta = forward_delta(module, layer, strength)
    assert float(delta.abs().max()) > 1e-2
    found = []
    for loader in WEBUIS:
        key = kohya_key(name)
        if loader == "kohya" and cls in (DiagOFTModule, ButterflyOFTModule):
            key = key.replace("lora_unet_", "oft_unet_")
        file = write_adapter(path, keyed(key, tensors_of(module)))
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


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.layer = layer


def reloaded(tensors: Mapping[str, Tensor], layer: nn.Module, strength: float) -> Tensor | None:
    """The change of the weight after the real loader, or None if it raises."""
    net = OneLayer(layer)
    try:
        network, _ = create_lycoris_from_weights(strength, "", net, dict(keyed("lycoris_block_layer", tensors)))
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return None
    return forward_delta(network.loras[0], layer, strength)


def agree_with_lycoris(tensors: Mapping[str, Tensor], layer: Any, strength: float, path: Path) -> bool:
    """Whether the reader and the real loader say the same; True where both load."""
    real = reloaded(tensors, layer, strength)
    file = write_adapter(path, keyed("lycoris_block_layer", tensors))
    weights = {"block.layer": layer.weight.detach()}
    if real is None:
        with pytest.raises(Refused):
            READERS["lycoris"](file, weights, None, strength)
        return False
    outcome = READERS["lycoris"](file, weights, None, strength)
    assert near(outcome.deltas.get("block.layer", torch.zeros_like(layer.weight)), real, 2e-5)
    return True


@pytest.mark.parametrize("strength", [pytest.param(1.0, marks=pytest.mark.slow), 0.7])
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
    file = write_adapter(tmp_path, keyed("lycoris_block_layer", tensors_of(module)))
    outcome = READERS["lycoris"](file, {"block.layer": layer.weight.detach()}, None, 0.5)
    network, _ = create_lycoris_from_weights(0.5, str(file), OneLayer(layer))
    x = torch.randn(3, 8)
    changed = nn.functional.layer_norm(
        x,
        (8,),
        layer.weight + outcome.deltas["block.layer"].float(),
        layer.bias + outcome.biases["block.layer"].float(),
    )
    assert near(network.loras[0](x), changed)


def test_factorizations() -> None:
    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 8, 12, 16, 64):
            assert read_factorization(size, factor) == lycoris_factorization(size, factor)
            assert read_peft_factorization(size, factor) == peft_factorization(size, factor)


def test_lycoris_silently_ignores_other_names(tmp_path: Path) -> None:
    tensors = {**keyed("lora_unet_block_layer", LORA), **keyed("lycoris_other", LORA)}
    outcome = READERS["lycoris"](write_adapter(tmp_path, tensors), {"block.layer": BASE}, None)
    assert outcome == Read({}, {}, sorted(tensors))
