"""Adapters of stacks of experts merged into checkpoints that hold such stacks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import MismatchError, WrongBaseError
from tests.support.experts import FAMILIES, language_model
from tests.support.laws import agree
from tests.support.zoo import train


def checkpoint(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def wrapped(base: nn.Module, kind: str, seed: int = 1, **options: object) -> nn.Module:
    model = copy.deepcopy(base)
    pk.wrap(model, kind, targets="*.experts.*", **options)
    train(model, seed, size=0.1)
    return model


def same_as_in_memory(written: Path, model: nn.Module) -> None:
    """The checkpoint is that of the model with its adapters merged, and nothing but the experts has changed."""
    pk.merge(model, backup=None)
    expected, found = model.state_dict(), load_file(written)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if "experts" in name:
            agree(tensor, expected[name], torch.float32, name)
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "dora", "oft"])
def test_a_native_file(family: str, kind: str, tmp_path: Path) -> None:
    base = language_model(family)
    model = wrapped(base, kind)
    plan = pk.plan_merge(
        checkpoint(base, tmp_path / "base.safetensors"), {pk.save(model, tmp_path / "own.safetensors"): 1}
    )
    assert len(plan.touched) == 4
    pk.merge_checkpoint(
        tmp_path / "base.safetensors", {tmp_path / "own.safetensors": 1.0}, tmp_path / "out.safetensors"
    )
    same_as_in_memory(tmp_path / "out.safetensors", model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_peft_beside_a_native_file(family: str, tmp_path: Path) -> None:
    base = language_model(family)
    model = wrapped(base, "lora", rank=2)
    pk.export(model, tmp_path / "peft", "peft")
    pk.wrap(model, "lokr", targets="*.experts.*", factor=4, name="second")
    train(model, 5, size=0.1, name="second")
    native = pk.save(model, tmp_path / "second.safetensors", "second")
    files: dict[Path, float] = {tmp_path / "peft": 0.5, native: -1.0}
    if family == "llama4":  # PEFT reads its matrices the other way round
        files.pop(native)
        pk.unwrap(model, "second")
    pk.merge_checkpoint(checkpoint(base, tmp_path / "base.safetensors"), files, tmp_path / "out.safetensors")
    pk.set_strength(model, 0.5, "default")
    if native in files:
        pk.set_strength(model, -1.0, "second")
    same_as_in_memory(tmp_path / "out.safetensors", model)


def test_another_base_and_other_shapes_are_refused(tmp_path: Path) -> None:
    base = language_model("gpt_oss")
    native = pk.save(wrapped(base, "lora", rank=2), tmp_path / "own.safetensors")
    other = checkpoint(language_model("gpt_oss", seed=5), tmp_path / "other.safetensors")
    with pytest.raises(WrongBaseError):
        pk.merge_checkpoint(other, {native: 1.0}, tmp_path / "out.safetensors")
    narrow: dict[str, Tensor] = {n: t[:2].contiguous() if t.dim() == 3 else t for n, t in load_file(other).items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(MismatchError, match=r"and the file adapts 4 × "):
        pk.merge_checkpoint(tmp_path / "narrow.safetensors", {native: 1.0}, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_square_matrices_of_peft_are_not_guessed(tmp_path: Path) -> None:
    base = language_model("qwen3_moe", hidden_size=24)
    pk.wrap(base, "lora", targets="*.down_proj", rank=2)
    train(base)
    pk.export(base, tmp_path / "peft", "peft")
    pk.unwrap(base)
    with pytest.raises(MismatchError, match="which way these square matrices lie"):
        pk.plan_merge(checkpoint(base, tmp_path / "base.safetensors"), {tmp_path / "peft": 1.0})


def test_a_checkpoint_of_experts_one_by_one_is_named(tmp_path: Path) -> None:
    base = language_model("mixtral")
    native = pk.save(wrapped(base, "lora", rank=2), tmp_path / "own.safetensors")
    apart = {name: tensor for name, tensor in base.state_dict().items() if "experts" not in name}
    apart["model.layers.0.block_sparse_moe.experts.0.w1.weight"] = torch.zeros(24, 16)
    save_file(apart, tmp_path / "apart.safetensors")
    with pytest.raises(MismatchError, match="tensor for each expert"):
        pk.plan_merge(tmp_path / "apart.safetensors", {native: 1.0})


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_a_file_is_read_on_its_base(family: str, tmp_path: Path) -> None:
    """What depends on the base goes into a LoRA of the same ΔW, with the base given as a model or as a checkpoint."""
    base = language_model(family)
    model = wrapped(base, "dora", rank=2)
    native = pk.save(model, tmp_path / "own.safetensors")
    for given in (base, checkpoint(base, tmp_path / "base.safetensors")):
        pk.convert(native, tmp_path / "lora.safetensors", "full", base=given, overwrite=True)
        other = copy.deepcopy(base)
        pk.load(other, tmp_path / "lora.safetensors")
        for name, parameter in pk_merged(other).items():
            agree(parameter, pk_merged(model)[name], torch.float32, name)


def pk_merged(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the experts with the adapters merged."""
    merged = copy.deepcopy(model)
    pk.merge(merged, backup=None)
    return {name: p for name, p in merged.named_parameters() if "experts" in name}
