"""Adapters of experts one by one, on models that keep them in one parameter."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, MismatchError, WrongBaseError
from tests.support.experts import language_model, tokens
from tests.support.laws import agree
from tests.support.zoo import train

#: family -> the path of a block in transformers 4, and its matrices: the upper half, the lower half, and the other
NAMES = {
    "mixtral": ("model.layers.{}.block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("model.layers.{}.mlp", ("gate_proj", "up_proj", "down_proj")),
}
each_family = pytest.mark.parametrize("family", NAMES)


def apart(model: nn.Module, family: str) -> nn.Module:
    """The experts as transformers 4 has them: a Linear for each matrix, with the weights of the model."""
    path, (gate, up, down) = NAMES[family]
    root = nn.Module()
    for layer in range(2):
        stacks = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for expert in range(4):
            halves = stacks.gate_up_proj.detach()[expert].chunk(2)
            for name, weight in ((gate, halves[0]), (up, halves[1]), (down, stacks.down_proj.detach()[expert])):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.clone())
                at = root
                *parents, last = f"{path.format(layer)}.experts.{expert}.{name}".split(".")
                for parent in parents:
                    if parent not in at._modules:
                        at.add_module(parent, nn.Module())
                    at = at.get_submodule(parent)
                at.add_module(last, linear)
    return root


def put_back(root: nn.Module, family: str, model: nn.Module) -> nn.Module:
    """A copy of the model with the weights of the experts that stand apart."""
    path, (gate, up, down) = NAMES[family]
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in range(2):
            stacks = changed.get_submodule(f"model.layers.{layer}.mlp.experts")
            for expert in range(4):
                own = {
                    name: root.get_submodule(f"{path.format(layer)}.experts.{expert}.{name}")
                    for name in (gate, up, down)
                }
                stacks.gate_up_proj[expert] = torch.cat([own[gate].weight, own[up].weight])
                stacks.down_proj[expert] = own[down].weight
    return changed


@each_family
@pytest.mark.parametrize(
    "rules",
    [
        [pk.Rule("Linear", "lora", rank=3, alpha=5)],
        [
            pk.Rule("re:.*experts.[02].*", "lora", rank=2),
            pk.Rule(r"re:.*\.(w1|gate_proj)", "lora", rank=4, rslora=True),
        ],
        [pk.Rule("re:.*experts.1.*", "loha", rank=2), pk.Rule("re:.*experts.3.*", "full")],
    ],
    ids=["all", "some of other ranks", "other kinds"],
)
def test_a_file_of_experts_apart_goes_onto_the_stacks(family: str, rules: list[pk.Rule], tmp_path: Path) -> None:
    model = language_model(family)
    root = apart(model, family)
    pk.wrap(root, rules=rules)
    train(root, size=0.1)
    path = pk.save(root, tmp_path / "apart.safetensors")
    pk.merge(root, backup=None)
    expected = put_back(root, family, model)(tokens()).logits
    report = pk.load(model, path)
    assert report.complete
    assert {name.rpartition(".")[2] for name in report.loaded} <= {"gate_up_proj", "down_proj"}
    agree(model(tokens()).logits, expected, torch.float32, family)
    pk.save(model, tmp_path / "stacks.safetensors")
    pk.unwrap(model)
    pk.load(model, tmp_path / "stacks.safetensors")
    agree(model(tokens()).logits, expected, torch.float32, "saved as stacks")


def of_peft(family: str, layers: Iterator[int] | range = range(2)) -> dict[str, Tensor]:
    """The tensors of a folder of PEFT, for half of the experts."""
    path, (gate, up, down) = NAMES[family]
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        for expert in (1, 3):
            for name, rows, columns in ((gate, 24, 16), (up, 24, 16), (down, 16, 24)):
                key = f"base_model.model.{path.format(layer)}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(2, columns, generator=generator) * 0.2
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.2
    return tensors


def folder_of_peft(folder: Path, tensors: dict[str, Tensor], alpha: float = 3) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["w1", "w2", "w3"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@each_family
def test_a_folder_of_peft_of_transformers_4(family: str, tmp_path: Path) -> None:
    model, tensors = language_model(family), of_peft(family)
    root = apart(model, family)
    with torch.no_grad():
        for name, module in root.named_modules():
            if f"base_model.model.{name}.lora_A.weight" in tensors:
                A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
                module.weight += 1.5 * B @ A
    expected = put_back(root, family, model)(tokens()).logits
    report = pk.load(model, folder_of_peft(tmp_path / "peft", tensors))
    assert report.complete
    agree(model(tokens()).logits, expected, torch.float32, family)


def test_another_base_is_noticed(tmp_path: Path) -> None:
    root = apart(language_model("mixtral"), "mixtral")
    pk.wrap(root, "lora", rank=2)
    train(root)
    path = pk.save(root, tmp_path / "apart.safetensors")
    other = language_model("mixtral", seed=7)
    with pytest.raises(WrongBaseError):
        pk.load(other, path)
    assert pk.load(other, path, other_base=True).complete


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, tensors = language_model("mixtral"), of_peft("mixtral")
    many = {key.replace("experts.3", "experts.7"): tensor for key, tensor in tensors.items()}
    with pytest.raises(MismatchError, match=r"experts\.7"):
        pk.load(model, folder_of_peft(tmp_path / "many", many))
    narrow = {k: t[:, :8].clone() if k.endswith("w1.lora_A.weight") else t for k, t in tensors.items()}
    with pytest.raises(MismatchError, match="the model's expert is 24×16"):
        pk.load(model, folder_of_peft(tmp_path / "narrow", narrow))
    with pytest.raises(FileError, match="in turns"):
        pk.load(language_model("gpt_oss"), folder_of_peft(tmp_path / "turns", tensors))
    root = apart(model, "mixtral")
    pk.wrap(root, "dora", rank=2)
    train(root)
    with pytest.raises(FileError, match=r"dora of .* depends on its base"):
        pk.load(model, pk.save(root, tmp_path / "dora.safetensors"))
    assert not hasattr(model.get_submodule("model.layers.0.mlp.experts"), "adapters")
