"""Verbs on the weights of a model that is divided among processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import UnsupportedLayerError
from tests.support.processes import distributed


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))


def wrapped() -> nn.Sequential:
    model = plain()
    pk.wrap(model, "dora", rank=2)
    with torch.no_grad():
        for at, parameter in enumerate(pk.adapter_parameters(model)):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at)))
    return model


def shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def _train_after_forward(folder: Path) -> list[list[Tensor]]:
    """What optimisers make of adapters, and of what parameter_groups gives, where a forward has left weights whole."""
    del folder
    x = torch.linspace(-1, 1, 12).view(2, 6)
    found = []
    for parameters in (pk.adapter_parameters, lambda model: pk.parameter_groups(model, lr=0.1)):
        model = wrapped()
        shard(model)
        with torch.no_grad():
            model(x)
        optimizer = torch.optim.SGD(parameters(model), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        found.append([parameter.full_tensor() for parameter in pk.adapter_parameters(model)])  # type: ignore[operator]
    return found


@pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard is public from torch 2.6 on")
@pytest.mark.processes
def test_an_optimiser_that_is_made_after_a_forward_trains_the_adapters(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 12).view(2, 6)
    model = wrapped()
    model(x).square().sum().backward()
    torch.optim.SGD(pk.adapter_parameters(model), lr=0.1).step()
    for found in distributed(_train_after_forward, tmp_path, folder=tmp_path):
        for trained in found:
            torch.testing.assert_close(trained, [*map(Tensor.detach, pk.adapter_parameters(model))])


def _save_merged(folder: Path) -> int:
    """A model that was merged before it was divided."""
    model = wrapped()
    pk.merge(model, backup="packed")
    shard(model)
    pk.save(model, folder / "merged.safetensors")
    return 0


@pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard is public from torch 2.6 on")
@pytest.mark.processes
def test_what_was_merged_before_is_saved_with_its_own_base(tmp_path: Path) -> None:
    distributed(_save_merged, tmp_path, folder=tmp_path)
    expected = pk.save(wrapped(), tmp_path / "expected.safetensors")
    assert (tmp_path / "merged.safetensors").read_bytes() == expected.read_bytes()


@contextmanager
def partitioned(model: nn.Module) -> Iterator[None]:
    """Leave every parameter empty, as ZeRO-3 does between calls, and give it back after the block."""
    full = {name: parameter.data for name, parameter in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        parameter.data, parameter.ds_id = torch.empty(0), number  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = full[name]


def test_parameters_that_zero_3_leaves_empty_are_refused_and_those_it_gathers_are_saved(tmp_path: Path) -> None:
    model, bare, path = wrapped(), plain(), tmp_path / "adapter.safetensors"
    whole = pk.save(wrapped(), tmp_path / "whole.safetensors")
    with partitioned(model), partitioned(bare):
        for verb in (
            lambda: pk.save(model, path),
            lambda: pk.export(model, tmp_path / "folder", target="peft"),
            lambda: pk.merge(model),
            lambda: pk.swap(model, whole),
            lambda: pk.reset_adapters(model),
            lambda: pk.limit_norms_(model, 1.0),
            lambda: pk.load(bare, whole),
        ):
            with pytest.raises(UnsupportedLayerError, match="GatheredParameters"):
                verb()
        with pytest.raises(UnsupportedLayerError, match="its weight is empty"):
            pk.wrap(bare, "lora")
        assert sorted(each.name for each in tmp_path.iterdir()) == ["whole.safetensors"]
    assert pk.save(model, path).read_bytes() == whole.read_bytes()
    pk.load(bare, path)
    x = torch.randn(2, 6)
    assert torch.equal(bare(x), model(x))
