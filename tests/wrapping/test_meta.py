"""Models made on the meta device: their adapters have values or say that they have none, and are never garbage."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.adapters import registry
from peftkit.errors import OptionError, UnsetAdapterError
from peftkit.geometry import Shape
from tests.support.zoo import ADAPTERS, train

#: the adapters of a Linear
MATRICES = [name for name, case in ADAPTERS.items() if not case.options.get("tucker")]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


def on_meta(adapter: str) -> nn.Sequential:
    """A network without memory, and its adapters."""
    model = network().to("meta")
    pk.wrap(model, ADAPTERS[adapter].kind, **ADAPTERS[adapter].options)
    return model


def filled(model: nn.Module) -> nn.Module:
    """The model with the base's weights, and memory that holds no number elsewhere, as `to_empty` may leave it."""
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
    model.load_state_dict(network().state_dict(), strict=False)
    return model


@pytest.mark.parametrize("adapter", MATRICES)
def test_an_adapter_without_values_is_not_run_saved_or_merged(adapter: str, tmp_path: Path) -> None:
    model, x = filled(on_meta(adapter)), torch.randn(2, 32)
    for verb in (
        lambda: model(x),
        lambda: pk.save(model, tmp_path / "a.safetensors"),
        lambda: pk.export(model, tmp_path / "b.safetensors", target="lycoris"),
        lambda: pk.merge(model),
    ):
        with pytest.raises(UnsetAdapterError, match="reset_adapters"):
            verb()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adapter", MATRICES)
def test_after_a_reset_the_adapter_starts_as_one_that_was_made_in_memory(adapter: str) -> None:
    model, base, x = filled(on_meta(adapter)), network(), torch.randn(2, 32)
    pk.reset_adapters(model)
    assert torch.allclose(model(x), base(x), atol=1e-6)
    train(model)
    twin = network()
    pk.wrap(twin, ADAPTERS[adapter].kind, **ADAPTERS[adapter].options)
    twin.load_state_dict(model.state_dict())
    assert torch.allclose(twin.eval()(x), model.eval()(x), atol=1e-6)


@pytest.mark.parametrize("adapter", MATRICES)
def test_a_state_dict_of_a_twin_gives_the_values(adapter: str) -> None:
    twin, x = network(), torch.randn(2, 32)
    pk.wrap(twin, ADAPTERS[adapter].kind, **ADAPTERS[adapter].options)
    train(twin)
    for assign in (False, True):
        model = on_meta(adapter)
        if not assign:
            filled(model)
        model.load_state_dict(copy.deepcopy(twin.state_dict()), assign=assign)
        assert torch.allclose(model.eval()(x), twin.eval()(x), atol=1e-6)


@pytest.mark.parametrize("adapter", MATRICES)
def test_reset_parameters_is_what_torch_calls(adapter: str) -> None:
    weight = torch.randn(16, 32)
    made = registry.build(ADAPTERS[adapter].kind, Shape(16, 32), weight, **ADAPTERS[adapter].options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(float("nan"))
    if made.derived() or made.from_base or made.reads_base:
        with pytest.raises(OptionError, match="reset_adapters"):
            made.reset_parameters()
        made.reset_parameters(weight)
    else:
        made.reset_parameters()
    delta = made.eval()(weight, 1.0)
    assert all(factor.isfinite().all() for factor in delta.factors)
    assert not delta.is_matrix or torch.allclose(delta.dense(), torch.zeros(()), atol=1e-6)


def test_a_file_is_not_loaded_onto_weights_without_memory(tmp_path: Path) -> None:
    trained = network()
    pk.wrap(trained, "lora", rank=2)
    train(trained)
    path = pk.save(trained, tmp_path / "a.safetensors")
    model = network().to("meta")
    with pytest.raises(UnsetAdapterError, match="to_empty"):
        pk.load(model, path)
    model.to_empty(device="cpu").load_state_dict(network().state_dict())  # as the message says
    pk.load(model, path)
    x = torch.randn(2, 32)
    assert torch.allclose(model(x), trained(x))


def test_a_weight_that_is_offloaded_is_named(tmp_path: Path) -> None:
    model = network()
    pk.wrap(model, "lora", rank=2)
    train(model)
    model[0].weight = nn.Parameter(model[0].weight.to("meta"), requires_grad=False)
    for verb in (lambda: pk.save(model, tmp_path / "a.safetensors"), lambda: pk.merge(model)):
        with pytest.raises(UnsetAdapterError, match=r"^0: its weight is on the meta device"):
            verb()
