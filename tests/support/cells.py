"""One cell of what can be exported: an adapter on a layer, written for a program and read back as that program reads.

A cell is a claim of the library, held against the readers of tests/support/readers, which were written from the
programs' sources by somebody else: `cell` returns how the adapter went out only after the program's reader has found
its ΔW in the file. scripts/support_table.py prints what it returns.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError, OptionError, UnsupportedLayerError
from peftkit.files.export.export import ExportReport
from peftkit.wrapping.installed import installed_adapters
from tests.support.models import tree
from tests.support.readers import READERS, Read
from tests.support.zoo import CASES, train

TARGETS = ("a1111", "forge", "comfyui", "kohya", "lycoris", "diffusers", "peft")

#: Errors of ΔW relative to its norm. Adapters that read their base subtract W from a sum in fp32, so that their ΔW is
#: known to the rounding of W: for them the bound is relative to ‖ΔW‖ + ‖W‖
BOUND = 1e-6

#: Where a program's law of strength is not W + s·ΔW: FORMATS.md §1.0, by target and structure
NONLINEAR = {
    ("comfyui", "oft"): "s²",
    ("comfyui", "boft"): "every stage is interpolated, and s once more",
    ("lycoris", "boft"): "every stage is interpolated",
    ("lycoris", "oft rescaled"): "the factor is not interpolated",
    ("lycoris", "dora"): "ΔW stays at s = 0",
    ("diffusers", "dora"): "s inside the norm",
    ("peft", "dora"): "s inside the norm",
    ("peft", "oft in"): "s has no effect",
    ("peft", "miss"): "s has no effect",
    **{("peft", kind): "there is none" for kind in ("vera", "randlora", "fourierft", "tiny-lora", "vb-lora")},
}


@dataclass(frozen=True)
class Layer:
    """A layer and its place in the U-Net of Stable Diffusion 1.5."""

    path: str
    make: Callable[[], nn.Module]


_RESNET = "down_blocks.0.resnets.0.conv1"
LAYERS: dict[str, Layer] = {
    "linear": Layer("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", lambda: nn.Linear(8, 16)),
    "conv 1×1": Layer("down_blocks.0.attentions.0.proj_in", lambda: nn.Conv2d(8, 16, 1)),
    "conv 3×3": Layer(_RESNET, lambda: nn.Conv2d(8, 16, 3, padding=1)),
}
RARE_LAYERS: dict[str, Layer] = {
    "conv1d": Layer(_RESNET, lambda: nn.Conv1d(8, 12, 3, padding=1)),
    "conv3d": Layer(_RESNET, lambda: nn.Conv3d(8, 12, (2, 1, 3))),
    "grouped": Layer(_RESNET, lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2)),
    "transposed": Layer(_RESNET, lambda: nn.ConvTranspose2d(8, 12, 3)),
}
ALL_LAYERS = {**LAYERS, **RARE_LAYERS}


_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
#: An adapter of every structure, each on its own module
MIXED = {
    f"{_BLOCK}.attn1.to_q": "lora",
    f"{_BLOCK}.attn1.to_k": "lora rslora",
    f"{_BLOCK}.attn1.to_v": "loha",
    f"{_BLOCK}.attn1.to_out.0": "lokr rank",
    f"{_BLOCK}.attn2.to_q": "dora",
    f"{_BLOCK}.attn2.to_k": "dora of lokr in",
    f"{_BLOCK}.attn2.to_v": "oft",
    f"{_BLOCK}.attn2.to_out.0": "oft series",
    f"{_BLOCK}.ff.net.0.proj": "full",
    f"{_BLOCK}.ff.net.2": "glora",
    "down_blocks.0.attentions.0.proj_in": "ia3 in",
    "down_blocks.0.resnets.0.conv1": "lora tucker",
    "down_blocks.0.resnets.0.conv2": "loldu",
}


def require_same_forward(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    """Raise AssertionError unless outputs agree to 1e-5, and the adapters changed them by a thousand times as much."""
    assert (theirs - base).norm() > 1e-2 * base.norm(), "the adapter does too little to be seen"
    error = float((ours - theirs).norm() / theirs.norm())
    assert error <= 1e-5, f"outputs differ by {error:.2e}"


@dataclass(frozen=True)
class Outcome:
    """How an adapter went out: "exact", "low rank", "baked" or "refused"; as what; and why not better."""

    how: str
    structure: str = ""
    note: str = ""


def wrapped(adapter: str, layers: Mapping[str, Callable[[], nn.Module]], seed: int = 0) -> nn.Module:
    """A model of these layers, in fp32, with a trained adapter of the zoo on each."""
    torch.manual_seed(seed)
    model = tree({path: make() for path, make in layers.items()})
    case = CASES[adapter]
    pk.wrap(model, case.kind, **case.options)
    train(model)
    return model


@cache
def _model(adapter: str, layers: tuple[str, ...]) -> nn.Module | None:
    try:
        return wrapped(adapter, {ALL_LAYERS[name].path: ALL_LAYERS[name].make for name in layers})
    except (OptionError, UnsupportedLayerError):  # there is no such adapter: law 11 of tests/support/laws.py
        return None


def exists(adapter: str, layer: str) -> bool:
    """Whether the layer can have the adapter at all."""
    return _model(adapter, (layer,)) is not None


def model_of(adapter: str, *layers: str) -> nn.Module:
    """The wrapped model of these layers; the same one every time."""
    model = _model(adapter, layers)
    assert model is not None, f"{adapter} does not go on {layers}"
    return model


def of_kinds(kinds: Mapping[str, str]) -> nn.Module:
    """A model of (path -> adapter of the zoo): convolutions where the path is a resnet's or proj_in, else Linear."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {}
    for path in kinds:
        convolution = nn.Conv2d(8, 16, 3 if "resnets" in path else 1)
        layers[path] = convolution if "resnets" in path or path.endswith("proj_in") else nn.Linear(8, 16)
    model = tree(layers)
    pk.wrap(model, rules=[pk.Rule(path, CASES[name].kind, **CASES[name].options) for path, name in kinds.items()])
    train(model)
    return model


def out(folder: Path, target: str, name: str = "adapter") -> Path:
    """Where an export goes: PEFT gets a folder."""
    return folder / (name if target == "peft" else f"{name}.safetensors")


def truths(model: nn.Module, prefix: str = "unet.", name: str | None = None) -> dict[str, tuple[Tensor, float]]:
    """Canonical name -> the wrapped model's own ΔW in the shape of the weight, and the error it may be read with."""
    found = {}
    with torch.no_grad():
        for at in installed_adapters(model, [name or "default"]):
            adapter, W = copy.deepcopy(at.adapter).double().eval(), at.base.double()
            delta = adapter(W, 1.0).dense()
            allowed = BOUND * float(delta.norm() + (W.norm() if adapter.reads_base else 0.0))
            shape = (at.slot.geometry.shape.rows, at.slot.geometry.shape.channels, *at.slot.geometry.shape.kernel)
            found[prefix + at.site] = delta.reshape(shape), allowed
    return found


def weights(model: nn.Module, prefix: str = "unet.") -> dict[str, Tensor]:
    """Canonical name -> weight, and `<name>.bias`: what a reader is given of the base."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if ".adapters" in f".{path}":
            continue
        for kind in ("weight", "bias"):
            tensor = module._parameters.get(kind)
            if tensor is not None:
                found[prefix + path + ("" if kind == "weight" else ".bias")] = tensor.detach()
    return found


def require_equal(read: Read, expected: Mapping[str, tuple[Tensor, float]], factor: float = 1.0) -> None:
    """Raise AssertionError unless a program changes just these weights, by factor·ΔW, and leaves no key unread."""
    assert read.ignored == [], f"keys without effect: {read.ignored}"
    assert read.biases == {}, f"changed biases: {list(read.biases)}"
    assert set(read.deltas) == set(expected), set(read.deltas) ^ set(expected)
    for name, (delta, allowed) in expected.items():
        error = float((read.deltas[name] - factor * delta).norm())
        assert error <= allowed, f"{name} at {factor}: an error of {error:.2e}, {allowed:.2e} allowed"


def require_read(
    path: Path, target: str, report: ExportReport, model: nn.Module, family: str | None, prefix: str = "unet."
) -> None:
    """Raise AssertionError unless the program makes the model's ΔW of the file, and 0.7·ΔW where it is linear.

    Where it is not linear the report must say so, and only there.
    """
    base, expected = weights(model, prefix), truths(model, prefix)
    require_equal(READERS[target](path, base, family, 1.0), expected)
    nonlinear = [w for w in report.weights if (target, w.structure) in NONLINEAR]
    warned = [w for w in report.weights if "not linear" in w.note]
    assert [w.written for w in warned] == [w.written for w in nonlinear], "the notes on strength are not the facts"
    if not nonlinear:
        require_equal(READERS[target](path, base, family, 0.7), expected, 0.7)


def cell(adapter: str, target: str, *layers: str, **options: Any) -> Outcome:
    """Export an adapter on these layers and read it as the target does. Raises AssertionError if ΔW is another."""
    model = model_of(adapter, *layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("adapter" if target == "peft" else "adapter.safetensors")
        try:
            report = pk.export(model, path, target, family="sd15", **options)
        except ExportError as error:
            assert list(Path(folder).iterdir()) == [], "a refused export left a file"
            return Outcome("refused", note=str(error))
        require_read(path, target, report, model, "sd15")
        assert len(report.weights) == len(layers)
        worst = max(report.weights, key=lambda w: ("exact", "low rank", "baked").index(w.how))
        return Outcome(worst.how, worst.structure, worst.note)
