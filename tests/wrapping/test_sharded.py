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
from tests.support.files import load, write
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


def _merge(folder: Path) -> list[int | Tensor]:
    """Refusals of a divided model, also while a forward pass has left it whole; and what it gives then."""
    model = wrapped()
    shard(model)
    x = torch.linspace(-1, 1, 12).view(2, 6)
    found: list[int | Tensor] = []
    for verb in (pk.merge, pk.restore):
        try:
            verb(model)
        except UnsupportedLayerError as error:
            found.append(int("pk.merge_checkpoint" in str(error)))
    with torch.no_grad():
        out = model(x)
    try:
        pk.merge(model, backup=None)
    except UnsupportedLayerError as error:
        found.append(int("pk.save the adapters from every process" in str(error)))
    pk.save(model, folder / "adapter.safetensors")
    return [*found, out]


@pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard is public from torch 2.6 on")
@pytest.mark.processes
def test_a_divided_model_is_not_merged_and_what_the_error_advises_works(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 12).view(2, 6)
    for *refused, out in distributed(_merge, tmp_path, folder=tmp_path):
        assert refused == [1, 1, 1]
        torch.testing.assert_close(out, wrapped()(x).detach(), rtol=1e-5, atol=1e-6)
    loaded = plain()
    pk.load(loaded, tmp_path / "adapter.safetensors")
    pk.merge(loaded)
    base = write(tmp_path / "base.safetensors", plain().state_dict())
    pk.merge_checkpoint(base, {tmp_path / "adapter.safetensors": 1.0}, tmp_path / "merged.safetensors")
    merged = plain()
    merged.load_state_dict(load(tmp_path / "merged.safetensors"))
    for model in (loaded, merged):
        torch.testing.assert_close(model(x), wrapped()(x), rtol=1e-5, atol=1e-5)


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
