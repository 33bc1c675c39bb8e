"""Merging file to file gives the same bits as merging in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit as pk
from tests.support.files import load, require_bits, same_bits, write
from tests.support.hands import exact
from tests.support.merging import DTYPE
from tests.support.models import accepting, adapt, key_of, merged_in_memory, net, state
from tests.support.numbers import close
from tests.support.zoo import ADAPTERS, train

#: of each sort one, for the 16-bit dtypes
A_FEW = ("lin", "k1", "k3", "transposed_grouped", "attention.k_proj", "attention.out_proj")
STRENGTHS = {torch.float32: (0.7, -0.5), torch.float16: (-0.5,), torch.bfloat16: (0.7,)}


@DTYPE
@pytest.mark.parametrize("case", ADAPTERS)
def test_file_to_file_is_merging_in_memory_bit_for_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = net(dtype)
    before = state(model)
    base = write(tmp_path / "base.safetensors", before)
    sites = [site for site in accepting(case) if dtype == torch.float32 or site in A_FEW]
    adapt(model, case, only=sites)
    file = pk.save(model, tmp_path / "adapter.safetensors")
    for strength in STRENGTHS[dtype]:
        expected, report = merged_in_memory(model, {"default": strength})
        out = tmp_path / "out.safetensors"
        ours = pk.merge_checkpoint(base, {file: strength}, out)
        merged = load(out)
        require_bits(merged, expected)
        keys = {key for key in before if not same_bits(before[key], merged[key])}
        assert {w.site for w in ours.weights} == keys == {key_of(site) for site in sites}
        assert ours.norm == pytest.approx(report.norm, rel=1e-6)
        assert ours.lost == pytest.approx(report.lost, rel=1e-4, abs=1e-9)


SETS: dict[str, dict[str, tuple[str, tuple[str, ...] | None]]] = {
    "lora, dora": {"a": ("lora", None), "b": ("dora", None)},
    "oft, full, loha": {"a": ("oft", None), "b": ("full", None), "c": ("loha", None)},
    "ia3, lokr on parts": {
        "a": ("ia3", ("attention.k_proj", "lin", "transposed")),
        "b": ("lokr", ("attention.q_proj", "attention.k_proj", "transposed", "k3")),
    },
    "glora, loldu, dora in": {"a": ("glora", None), "b": ("loldu", None), "c": ("dora in", None)},
}


@DTYPE
@pytest.mark.parametrize("chosen", SETS)
def test_several_adapters_merge_at_once_as_in_memory(chosen: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each reads the base as it was, and they are added in the order they are given."""
    model = net(dtype)
    base = write(tmp_path / "base.safetensors", state(model))
    strengths = dict(zip("abc", (0.7, -0.5, 0.3), strict=False))
    files: dict[Path, float] = {}
    for seed, (name, (case, only)) in enumerate(SETS[chosen].items(), start=1):
        adapt(model, case, name, only, seed)
    for name in SETS[chosen]:
        files[pk.save(model, tmp_path / f"{name}.safetensors", name)] = strengths[name]
    expected, _ = merged_in_memory(model, {name: strengths[name] for name in SETS[chosen]})
    pk.merge_checkpoint(base, files, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("case", ["oft", "dora", "dora in", "loha", "lokr", "loldu", "ia3"])
def test_a_weight_of_several_row_blocks_merges_as_in_memory(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"big": nn.Linear(1100, 1000, bias=False), "deep": nn.ConvTranspose2d(120, 260, 3)}).half()
    base = write(tmp_path / "base.safetensors", state(model))
    pk.wrap(model, ADAPTERS[case].kind, **ADAPTERS[case].options)
    train(model, size=0.05)
    file = pk.save(model, tmp_path / "adapter.safetensors")
    expected, _ = merged_in_memory(model, {"default": -0.5})
    pk.merge_checkpoint(base, {file: -0.5}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("case", ["loldu", "loldu rank 1", "dora of loldu"])
def test_files_with_and_without_the_bases_factors_merge_alike(case: str, portable: bool, tmp_path: Path) -> None:
    model = net()
    base = write(tmp_path / "base.safetensors", state(model))
    adapt(model, case)
    file = pk.save(model, tmp_path / "adapter.safetensors", portable=portable)
    expected, _ = merged_in_memory(model, {"default": 0.7})
    pk.merge_checkpoint(base, {file: 0.7}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)


def test_a_model_that_is_one_layer_merges(tmp_path: Path) -> None:
    """Its tensors are called "weight" and "bias", and its adapter's weight has no name."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 12)
    base = write(tmp_path / "base.safetensors", state(layer))
    pk.wrap(layer, "lora", rank=2)
    train(layer)
    file = pk.save(layer, tmp_path / "adapter.safetensors")
    expected, _ = merged_in_memory(layer, {"default": 0.7})
    pk.merge_checkpoint(base, {file: 0.7}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("kind", ["diff", "ia3"])
def test_a_change_of_a_transposed_convolution_merges_beside_an_adapter_of_it(kind: str, tmp_path: Path) -> None:
    """One file knows its weight as (out, in), the other changes it as it is stored; both read it as it was."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(6, 6, 3)})
    before = state(model)
    base = write(tmp_path / "base.safetensors", before)
    pk.wrap(model, "full")
    with torch.no_grad():
        model["up"].adapters["default"].change.copy_(exact(6, 54, seed=3))
    own = pk.save(model, tmp_path / "own.safetensors")
    W = before["up.weight"].double()
    if kind == "diff":
        diff = exact(6, 6, 3, 3, seed=4).double()
        tensors = {"lycoris_up.diff": diff.float()}
    else:
        gate = exact(1, 6, 1, 1, seed=4)
        diff = gate.double().reshape(6, 1, 1, 1) * W
        tensors = {"lycoris_up.weight": gate, "lycoris_up.on_input": torch.tensor(0)}
    theirs = write(tmp_path / "theirs.safetensors", tensors)
    alone, _ = merged_in_memory(model, {"default": 1.0})
    change = alone["up.weight"].double() - W
    for adapters in ({own: 1.0, theirs: 1.0}, {theirs: 1.0, own: 1.0}):
        (merged,) = pk.merge_checkpoint(base, adapters, tmp_path / "out.safetensors").weights
        close(load(tmp_path / "out.safetensors")["up.weight"], W + change + diff, 1e-6)
        assert merged.norm == pytest.approx(float((change + diff).norm()), rel=1e-5)
