"""PEFT's folders of VB-LoRA and TinyLoRA, whose modules train numbers in common."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftkit as pk
from peftkit.errors import FileError
from peftkit.wrapping.installed import installed_adapters

M, N = 12, 10
VB: dict[str, Any] = {"r": 3, "num_vectors": 9, "vector_length": 2, "topk": 3, "init_vector_bank_bound": 0.5}


def net(linear: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    if linear:
        return nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, N))
    layers = nn.Sequential(Conv1D(M, N), nn.Tanh(), Conv1D(N, M))
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight, std=0.3)
    return layers


def saved(config: peft.PeftConfig, folder: Path, linear: bool = True) -> tuple[Path, Tensor, Tensor]:
    """A folder of a model that PEFT has trained, an input, and the model's output."""
    model = peft.get_peft_model(net(linear), config)
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            torch.manual_seed(number)
            parameter.data += 0.3 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that it knows nothing of
        model.save_pretrained(str(folder))
    x = torch.randn(4, N)
    with torch.no_grad():
        return folder, x, model.eval()(x)


def config_of(kind: str, linear: bool = True, **options: Any) -> peft.PeftConfig:
    flipped = {"target_modules": ["0", "2"], "fan_in_fan_out": not linear}
    if kind == "vb-lora":
        return peft.VBLoRAConfig(**{**VB, **options}, **flipped)
    return peft.TinyLoraConfig(**{"r": 3, "u": 5, "weight_tying": 1.0, **options}, **flipped)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"), [("vb-lora", {}), ("vb-lora", {"save_only_topk_weights": True}), ("tiny-lora", {})]
)
def test_a_folder_is_read(kind: str, options: dict[str, Any], linear: bool, tmp_path: Path) -> None:
    folder, x, expected = saved(config_of(kind, linear, **options), tmp_path / "peft", linear)
    model = net(linear)
    assert pk.load(model, folder).complete
    torch.testing.assert_close(model(x), expected)
    twin = net(linear)
    pk.load(twin, pk.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(twin(x), model(x))
    pk.merge(model)
    torch.testing.assert_close(model(x), expected)


def test_the_bank_is_shared_again_and_the_start_is_left_in(tmp_path: Path) -> None:
    folder, x, _ = saved(config_of("vb-lora"), tmp_path)
    model = net()
    pk.load(model, folder)
    first, second = (at.adapter for at in installed_adapters(model))
    assert first.kind == "vb-lora" and first.get_parameter("bank") is second.get_parameter("bank")
    assert not first.get_buffer("up0").any() and not second.get_buffer("down0").any()
    stored = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(first.get_parameter("bank"), stored["base_model.vblora_vector_bank"])
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert first.get_parameter("bank") is second.get_parameter("bank")


def test_tiny_lora_is_read_as_a_lora(tmp_path: Path) -> None:
    folder, *_ = saved(config_of("tiny-lora"), tmp_path)
    assert {patch.kind for patch in pk.read(folder).patches.values()} == {"lora"}


def in_peft(folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(net(), str(folder)).eval()


def type_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def test_tiny_lora_goes_into_a_folder_of_its_own_type(tmp_path: Path) -> None:
    model, x = net(), torch.randn(4, N)
    pk.wrap(model, "tiny-lora", rank=3, size=5)
    with torch.no_grad():
        pk.adapter_parameters(model)[0].normal_()
    folder = pk.export(model, tmp_path / "one", target="peft").path
    assert type_of(folder) == "TINYLORA"
    torch.testing.assert_close(in_peft(folder)(x), model(x))
    twin = net()
    pk.load(twin, folder)
    torch.testing.assert_close(twin(x), model(x))
    several = net()
    pk.wrap(several, "tiny-lora", rank=3, size=5, shared_by=1)
    with torch.no_grad():
        for parameter in pk.adapter_parameters(several):
            parameter.normal_()
    folder = pk.export(several, tmp_path / "several", target="peft").path
    assert type_of(folder) == "LORA"  # which module has which vector is in no file of PEFT
    torch.testing.assert_close(in_peft(folder)(x), several(x))


def test_vb_lora_without_its_start_taken_off_goes_back_as_it_came(tmp_path: Path) -> None:
    folder, x, _ = saved(config_of("vb-lora"), tmp_path / "came")
    model = net()
    pk.load(model, folder)
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.01)
    model(x).square().sum().backward()
    optimizer.step()
    back = pk.export(model, tmp_path / "back", target="peft").path
    assert type_of(back) == "VBLORA"
    torch.testing.assert_close(in_peft(back)(x), model(x))
    fresh = net()
    pk.wrap(fresh, "vb-lora", rank=3, vectors=9, length=2, top=3, bound=0.5)
    with torch.no_grad():
        for parameter in pk.adapter_parameters(fresh):
            parameter.add_(0.3 * torch.randn_like(parameter))
    lora = pk.export(fresh, tmp_path / "lora", target="peft").path
    assert type_of(lora) == "LORA"
    torch.testing.assert_close(in_peft(lora)(x), fresh(x))


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("tiny-lora", {"weight_tying": 0.0}, r"2 vectors of TinyLoRA are in it \(weight_tying=0\.0\)"),
        ("tiny-lora", {"save_projection": False}, "tinylora_P is not in the file"),
    ],
)
@pytest.mark.filterwarnings("ignore:Specified to not save projection")
def test_what_a_folder_does_not_say_is_named(kind: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, *_ = saved(config_of(kind, **options), tmp_path)
    with pytest.raises(FileError, match=said):
        pk.load(net(), folder)


def _changed(key: str, tensor: Tensor | None) -> Any:
    return lambda t: t.pop(key) if tensor is None else t.update({key: tensor})


LOGITS = "base_model.model.0.vblora_logits_A"


@pytest.mark.parametrize(
    ("kind", "options", "change", "settings", "said"),
    [
        ("vb-lora", {}, _changed("base_model.vblora_vector_bank", None), {}, "no vblora_vector_bank"),
        ("vb-lora", {}, _changed(LOGITS, torch.ones(3, 5, 8)), {}, r"are no \(m/b, r, h\)"),
        ("vb-lora", {}, _changed(LOGITS, None), {}, "logits_up"),
        ("vb-lora", {}, lambda _: None, {"topk": 10}, "topk is 10"),
        ("vb-lora", {}, lambda _: None, {"topk": None}, "topk is None"),
        (
            "vb-lora",
            {"save_only_topk_weights": True},
            _changed(f"{LOGITS}_topk_indices", torch.full((3, 5, 3), 9, dtype=torch.uint8)),
            {},
            "not different numbers from 0 to 8",
        ),
        (
            "vb-lora",
            {"save_only_topk_weights": True},
            _changed(f"{LOGITS}_topk_weights", torch.ones(3, 5, 3)),
            {},
            r"are no \(…, k\) and \(…, k − 1\)",
        ),
        ("tiny-lora", {}, _changed("base_model.tinylora_v.0", torch.ones(4)), {}, r"are no \(u\)"),
        ("tiny-lora", {}, _changed("base_model.model.0.tinylora_A", None), {}, "right"),
    ],
)
def test_a_damaged_folder_is_refused(
    kind: str, options: dict[str, Any], change: Any, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder, *_ = saved(config_of(kind, **options), tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FileError, match=said):
        pk.load(model, folder)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
