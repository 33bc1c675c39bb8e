"""Files of adapters of stacks of experts through the verbs that rewrite files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError
from tests.support.experts import language_model, tokens
from tests.support.laws import agree
from tests.support.zoo import train


def trained(kind: str, base: nn.Module, seed: int = 1, **options: object) -> nn.Module:
    model = copy.deepcopy(base)
    pk.wrap(model, kind, targets="*.experts.*", **options)
    train(model, seed, size=0.1)
    return model


def logits(base: nn.Module, path: Path) -> torch.Tensor:
    model = copy.deepcopy(base)
    pk.load(model, path)
    return model(tokens()).logits


def merged(base: nn.Module, *weighted: tuple[nn.Module, float]) -> torch.Tensor:
    """The logits of the base with a weighted sum of the ΔW of models that were wrapped."""
    model = copy.deepcopy(base)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for other, weight in weighted:
            changed = copy.deepcopy(other)
            pk.merge(changed, backup=None)
            before = dict(base.named_parameters())
            for name, parameter in changed.named_parameters():
                own[name] += weight * (parameter - before[name])
        return model(tokens()).logits


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
@pytest.mark.parametrize("kind", ["lora", "loha", "full"])
def test_convert_and_resize_go_expert_by_expert(family: str, kind: str, tmp_path: Path) -> None:
    base = language_model(family)
    model = trained("loha", base, rank=2)
    path = pk.save(model, tmp_path / "own.safetensors")
    expected = model(tokens()).logits
    report = pk.convert(path, tmp_path / "converted.safetensors", kind)
    assert all(module.error < 1e-5 for module in report.modules)
    agree(logits(base, tmp_path / "converted.safetensors"), expected, torch.float32, kind)
    pk.resize(path, tmp_path / "resized.safetensors", rank=4)  # of two products of rank 2
    agree(logits(base, tmp_path / "resized.safetensors"), expected, torch.float32, "resized")


def test_ranks_by_energy_may_differ_from_expert_to_expert(tmp_path: Path) -> None:
    base = language_model("mixtral")
    path = pk.save(trained("full", base), tmp_path / "own.safetensors")
    report = pk.resize(path, tmp_path / "resized.safetensors", energy=0.9)
    assert all(0 < module.error < 0.4 for module in report.modules)
    assert logits(base, tmp_path / "resized.safetensors").isfinite().all()
    with pytest.raises(ExportError, match="they share one adapter"):
        pk.convert(path, tmp_path / "converted.safetensors", "loha", energy=0.9)


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_combine_sums_expert_by_expert(method: str, tmp_path: Path) -> None:
    base = language_model("gpt_oss")
    models = [trained("lora", base, 1, rank=2), trained("lora", base, 2, rank=1)]
    paths = [pk.save(model, tmp_path / f"{i}.safetensors") for i, model in enumerate(models)]
    pk.combine({paths[0]: 0.5, paths[1]: -2.0}, tmp_path / "sum.safetensors", method=method)
    expected = merged(base, (models[0], 0.5), (models[1], -2.0))
    agree(logits(base, tmp_path / "sum.safetensors"), expected, torch.float32, method)


def test_rescale_inspect_and_diff(tmp_path: Path) -> None:
    base = language_model("qwen3_moe")
    model = trained("lora", base, rank=2)
    path = pk.save(model, tmp_path / "own.safetensors")
    pk.export(model, tmp_path / "peft", "peft")
    for source, out in ((path, tmp_path / "half.safetensors"), (tmp_path / "peft", tmp_path / "half")):
        pk.rescale(source, 0.5, out)
        agree(logits(base, out), merged(base, (model, 0.5)), torch.float32, "half")
        assert len(pk.inspect(source).modules) == 4
    assert "4 of them equal" in str(pk.diff(path, tmp_path / "peft"))


def test_a_file_is_swapped_in(tmp_path: Path) -> None:
    base = language_model("mixtral")
    first, second = trained("lora", base, 1, rank=2), trained("lora", base, 2, rank=2)
    pk.swap(first, pk.save(second, tmp_path / "second.safetensors"))
    assert torch.equal(first(tokens()).logits, second(tokens()).logits)
