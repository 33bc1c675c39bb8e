"""GLoRA on convolutions: LyCORIS' own module is the oracle, of the file that is written for it too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lycoris.modules.glora import GLoRAModule
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError
from peftkit.wrapping.installed import installed_adapters
from tests.support.readers import READERS
from tests.support.zoo import train

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "k3 s2": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "k3 d2": lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2),
    "k(1,3)": lambda: nn.Conv2d(8, 12, (1, 3), padding=(0, 1)),
    "k3 of as many outputs": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "conv1d": lambda: nn.Conv1d(8, 12, 5, padding=2),
    "conv3d": lambda: nn.Conv3d(8, 12, (1, 2, 3)),
}
GROUPED = {"grouped": lambda: nn.Conv2d(8, 12, 3, groups=2), "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8)}


def trained(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model with a GLoRA on its layer, the layer alone, and ΔW in the shape of the weight."""
    torch.manual_seed(0)
    layer = make()
    plain = make()
    plain.load_state_dict(layer.state_dict())
    model = nn.Sequential(layer)
    pk.wrap(model, "glora", rank=2, alpha=1)
    train(model)
    where = next(installed_adapters(model))
    with torch.no_grad():
        return model, plain, where.adapter(where.base, 1.0).dense().reshape(plain.get_parameter("weight").shape)


@pytest.mark.parametrize("label", LAYERS)
@torch.no_grad()
def test_lycoris_builds_the_same_module_of_the_file(label: str, tmp_path: Path) -> None:
    model, plain, delta = trained(LAYERS[label])
    report = pk.export(model, tmp_path / "a.safetensors", "lycoris")
    assert [(w.how, w.structure) for w in report.weights] == [("exact", "glora")]
    t = {key.rpartition("lycoris_0.")[2]: tensor for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    own = GLoRAModule.make_module_from_state_dict(
        "a", plain, *(t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2")), None, t["alpha"]
    )
    change, _ = own.get_diff_weight()
    assert (change - delta).norm() <= 1e-6 * delta.norm()
    x = torch.randn(2, 8, *[9] * (plain.get_parameter("weight").dim() - 2))
    own.apply_to()
    assert torch.allclose(plain(x), model(x), atol=1e-5)


@pytest.mark.parametrize("label", GROUPED)
@torch.no_grad()
def test_of_groups_lycoris_has_no_module_and_comfyui_has_the_change(label: str, tmp_path: Path) -> None:
    model, plain, delta = trained(GROUPED[label])
    weight = plain.get_parameter("weight").detach()
    factors = [
        torch.zeros(8, 2, 1, 1),
        torch.zeros(2, 8, 1, 1),
        torch.zeros(len(weight), 2, 1, 1),
        torch.zeros(2, 8, 3, 3),
    ]
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        GLoRAModule.make_module_from_state_dict("a", plain, *factors, None, 2).get_diff_weight()
    (written,) = pk.export(model, tmp_path / "lycoris.safetensors", "lycoris").weights
    assert written.how == "baked" and "LyCORIS fails on GLoRA of a grouped convolution" in written.note
    (written,) = pk.export(model, tmp_path / "comfyui.safetensors", "comfyui", family="own").weights
    assert (written.how, written.structure) == ("exact", "glora")
    found = READERS["comfyui"](tmp_path / "comfyui.safetensors", {"0": weight}, None, 1.0)
    assert (found.deltas["0"] - delta).norm() <= 1e-6 * delta.norm()


def test_of_a_transposed_convolution_no_program_reads_any(tmp_path: Path) -> None:
    model, _, _ = trained(lambda: nn.ConvTranspose2d(8, 12, 3, stride=2))
    with pytest.raises(ExportError, match="transposed"):
        pk.export(model, tmp_path / "a.safetensors", "lycoris")
