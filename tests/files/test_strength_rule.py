"""A file holds the adapter at strength 1; forward, merge and merge_checkpoint apply λ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))


X = torch.linspace(-1, 1, 12).reshape(2, 6)

#: format -> how a wrapped model is written in it
WRITERS: dict[str, Callable[[nn.Module, Path], Path]] = {
    "native": lambda net, folder: pk.save(net, folder / "own.safetensors"),
    "kohya": lambda net, folder: pk.export(net, folder / "kohya.safetensors", "lycoris").path,
    "peft": lambda net, folder: pk.export(net, folder / "peft", "peft").path,
}


def wrapped() -> nn.Sequential:
    net = base()
    pk.wrap(net, "lora", rank=2)
    for parameter in pk.adapter_parameters(net):
        nn.init.normal_(parameter)
    return net


def deltas(path: Path) -> list[Tensor]:
    """ΔW of every layer, as a load at strength 1 gives it."""
    net = base()
    pk.load(net, path)
    pk.merge(net)
    pairs = zip(net.children(), base().children(), strict=True)
    return [(layer.get_parameter("weight") - plain.get_parameter("weight")).detach() for layer, plain in pairs]


@pytest.mark.parametrize("strength", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("format", WRITERS)
def test_a_file_is_the_same_at_every_strength(format: str, strength: float, tmp_path: Path) -> None:
    net = wrapped()
    whole = net(X)
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    at_one = deltas(WRITERS[format](net, tmp_path / "one"))
    pk.set_strength(net, strength)
    with pk.disabled(net):
        path = WRITERS[format](net, tmp_path / "other")
    for ours, theirs in zip(deltas(path), at_one, strict=True):
        assert torch.equal(ours, theirs)
    fresh = base()
    pk.load(fresh, path)
    torch.testing.assert_close(fresh(X), whole)


@pytest.mark.parametrize("format", WRITERS)
def test_a_converted_file_is_at_strength_one(format: str, tmp_path: Path) -> None:
    net = wrapped()
    pk.set_strength(net, 0.3)
    path = WRITERS[format](net, tmp_path)
    out = pk.convert(path, tmp_path / ("resized" if format == "peft" else "full.safetensors"), "loha").path
    for ours, theirs in zip(deltas(out), deltas(path), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("format", WRITERS)
def test_merges_apply_the_strength(format: str, tmp_path: Path) -> None:
    net = wrapped()
    pk.set_strength(net, 0.3)
    expected = net(X)
    path = WRITERS[format](net, tmp_path)
    save_file(base().state_dict(), tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {path: 0.3}, tmp_path / "merged.safetensors")
    merged = base()
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(merged(X), expected)
    in_memory = copy.deepcopy(net)
    pk.merge(in_memory)
    torch.testing.assert_close(in_memory(X), expected)
