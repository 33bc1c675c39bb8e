"""Kinds that PEFT has too go into its folder as PEFT stores them, and PEFT's own model computes the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError
from peftkit.wrapping.installed import installed_adapters
from tests.support.zoo import train

#: case -> kind, its options, and PEFT's type
OWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "svdlora": ("svdlora", {"rank": 4, "alpha": 6}, "ADALORA"),
    "sora": ("svdlora", {"rank": 3, "init": "sora"}, "ADALORA"),
    "miss": ("miss", {"rank": 4}, "MISS"),
    "miss mini": ("miss", {"rank": 5, "mini": 2}, "MISS"),
    "miss bat": ("miss", {"rank": 2, "bat": True}, "MISS"),
    "vera": ("vera", {"rank": 6, "seed": 4}, "VERA"),
    "randlora": ("randlora", {"rank": 4, "alpha": 3, "pairing": "peft"}, "RANDLORA"),
    "randlora of one basis": (
        "randlora",
        {"rank": 16, "alpha": 4, "pairing": "peft", "save_projection": True},
        "RANDLORA",
    ),
    "fourierft": ("fourierft", {"frequencies": 30, "scaling": 40.0, "seed": 5}, "FOURIERFT"),
}


def net() -> nn.Module:
    """Weights of which one is wide, one tall, one square."""
    torch.manual_seed(0)
    inner = nn.ModuleDict({"wide": nn.Linear(24, 12), "tall": nn.Linear(12, 16), "square": nn.Linear(16, 16)})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = inner

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.block.values():
                x = layer(x).tanh()
            return x

    return Net()


def exported(folder: Path, dress: Callable[[nn.Module], object], **options: Any) -> tuple[Any, Tensor, Tensor]:
    """The report, an input, and the output of the model that was exported into a folder."""
    model, x = net(), torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    dress(model)
    train(model)
    with torch.no_grad():
        return pk.export(model, folder, "peft", **options), x, model.eval()(x)


def by_peft(folder: Path, x: Tensor) -> Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of RandLoRA PEFT misses the copies that its files have for every module
        return peft.PeftModel.from_pretrained(net(), folder).eval()(x)  # type: ignore[arg-type]


def type_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("case", OWN)
def test_peft_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, options, peft_type = OWN[case]
    report, x, expected = exported(tmp_path / "out", lambda model: pk.wrap(model, kind, **options))
    assert type_of(tmp_path / "out") == peft_type
    assert {w.how for w in report.weights} == {"exact"} and all(w.error < 1e-6 for w in report.weights if w.error)
    with torch.no_grad():
        base = net().eval()(x)
    assert (expected - base).norm() > 0.05 * base.norm()
    assert torch.allclose(by_peft(tmp_path / "out", x), expected, atol=2e-6)
    again = net()
    assert pk.load(again, tmp_path / "out").complete
    assert {where.adapter.kind for where in installed_adapters(again)} == {kind}
    with torch.no_grad():
        assert torch.allclose(again.eval()(x), expected, atol=2e-6)
    report, x, expected = exported(tmp_path / "again", lambda model: pk.load(model, tmp_path / "out"))
    assert type_of(tmp_path / "again") == peft_type
    assert torch.allclose(by_peft(tmp_path / "again", x), expected, atol=2e-6)


def ranks(model: nn.Module) -> None:
    pk.wrap(model, rules=[pk.Rule("*wide", "vera", rank=4), pk.Rule("*tall", "vera", rank=5)])


def seeds(model: nn.Module) -> None:
    pk.wrap(model, rules=[pk.Rule("*wide", "vera", rank=4), pk.Rule("*tall", "vera", rank=4, seed=1)])


def tables(model: nn.Module) -> None:
    pk.wrap(model, "vera", rank=4, save_projection=True)
    with torch.no_grad():
        next(installed_adapters(model)).adapter.get_buffer("left")[3, 0] += 1


def kinds(model: nn.Module) -> None:
    pk.wrap(model, rules=[pk.Rule("*wide", "miss", rank=4), pk.Rule("*tall", "svdlora", rank=4)])


def papers(model: nn.Module) -> None:
    pk.wrap(model, "randlora", rank=4)


def counts(model: nn.Module) -> None:
    pk.wrap(model, rules=[pk.Rule("*wide", "fourierft", frequencies=4), pk.Rule("*tall", "fourierft", frequencies=5)])


def places(model: nn.Module) -> None:
    pk.wrap(model, "fourierft", frequencies=4)
    for where in installed_adapters(model):
        where.adapter.get_buffer("indices")[0, 0] += 1 if where.adapter.get_buffer("indices")[0, 0] == 0 else -1


@pytest.mark.parametrize("dress", [ranks, seeds, tables, kinds, papers, counts, places])
def test_what_peft_s_own_form_cannot_hold_is_a_lora(dress: Callable[[nn.Module], None], tmp_path: Path) -> None:
    report, x, expected = exported(tmp_path / "out", dress)
    assert type_of(tmp_path / "out") == "LORA"
    assert {w.how for w in report.weights} == {"low rank"}
    assert torch.allclose(by_peft(tmp_path / "out", x), expected, atol=1e-5)


def test_a_convolution_makes_all_of_a_folder_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    pk.wrap(model, "svdlora", rank=2)
    train(model)
    report = pk.export(model, tmp_path / "out", "peft")
    assert [(w.how, w.structure) for w in report.weights] == [("low rank", "lora")] * 2


def test_a_change_that_reads_its_base_needs_none_where_peft_has_it(tmp_path: Path) -> None:
    model = net()
    pk.wrap(model, "miss", rank=2, bat=True)
    train(model)
    path = pk.save(model, tmp_path / "a.safetensors")
    assert pk.export(path, tmp_path / "out", "peft").weights[0].how == "exact"
    with pytest.raises(ExportError, match="ComfyUI has no miss of this form; give the base"):
        pk.export(path, tmp_path / "a-comfyui.safetensors", "comfyui", family="own")


@pytest.mark.parametrize("case", [case for case in OWN if case != "miss bat"])
def test_a_folder_is_rescaled(case: str, tmp_path: Path) -> None:
    kind, options, peft_type = OWN[case]
    _, x, _ = exported(tmp_path / "out", lambda model: pk.wrap(model, kind, **options))
    pk.rescale(tmp_path / "out", -0.5, tmp_path / "half")
    model = net()
    pk.load(model, tmp_path / "out")
    pk.set_strength(model, -0.5)
    assert type_of(tmp_path / "half") == peft_type
    with torch.no_grad():
        assert torch.allclose(by_peft(tmp_path / "half", x), model.eval()(x), atol=1e-5)
