"""Files of adapters that share parameters: each is stored once, and shared again where it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkit as pk
from peftkit.errors import FileError, MismatchError
from tests.support.files import metadata, same_bits, write
from tests.support.zoo import train
from tests.wrapping.test_in_common import SHARING, X, adapters, is_shared, kinds, net, wrapped


def trained(kind: str, **given: Any) -> nn.Sequential:
    model = wrapped(kind, **given)
    train(model)
    return model


def header(path: Path) -> dict[str, Any]:
    return json.loads(metadata(path)["peftkit"])


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changed: Any) -> Path:
    """The file with other tensors, or with other entries of its header; None takes one out."""
    entries = {key: value for key, value in {**header(path), **changed}.items() if value is not None}
    held = load_file(path) if tensors is None else tensors
    return write(path.with_name("changed.safetensors"), held, {"peftkit": json.dumps(entries)})


@kinds
def test_a_shared_parameter_is_stored_once_and_shared_again(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    path = pk.save(model, tmp_path / "a.safetensors")
    stored = load_file(path)
    for name in SHARING[kind][1]:
        assert [key for key in stored if key.endswith(f".{name}")] == [f"shared.{name}"]
        assert same_bits(stored[f"shared.{name}"], adapters(model)[0].get_parameter(name).detach())
    assert header(path)["schema"] == 2
    assert header(path)["common"] == {
        f"shared.{name}": [f"{site}.{name}" for site in ("0", "2", "3.0")] for name in SHARING[kind][1]
    }
    twin = net()
    pk.load(twin, path)
    assert torch.equal(twin(X), model(X)) and is_shared(kind, twin)
    assert len(pk.adapter_parameters(twin)) == len(pk.adapter_parameters(model))
    assert pk.save(twin, tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    numbers = sum(module.parameters for module in pk.inspect(path).modules)
    assert numbers == sum(tensor.numel() for tensor in stored.values())


@kinds
def test_training_goes_on_with_one_parameter(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    twin = net()
    pk.load(twin, pk.save(model, tmp_path / "a.safetensors"))
    for each in (model, twin):
        optimizer = torch.optim.Adam(pk.adapter_parameters(each), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(X).square().sum().backward()
            optimizer.step()
    assert torch.equal(model(X), twin(X)) and is_shared(kind, twin)


@kinds
def test_of_one_layer_nothing_is_shared(kind: str, tmp_path: Path) -> None:
    path = pk.save(trained(kind, targets="2"), tmp_path / "a.safetensors")
    assert header(path)["schema"] == 1 and "common" not in header(path)
    assert not any(key.startswith("shared.") for key in load_file(path))


@kinds
def test_parts_of_a_file_and_parts_of_a_model(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    path = pk.save(model, tmp_path / "a.safetensors")
    smaller = net()[:2]
    with pytest.raises(MismatchError, match=r"unexpected.*(?s:.)*the model has no weight '2'"):
        pk.load(smaller, path)
    report = pk.load(smaller, path, strict=False)
    assert report.loaded == ("0",)
    with torch.no_grad():
        assert torch.equal(smaller(X), model[:2](X))
    larger = nn.Sequential(*net(), nn.Linear(8, 8))
    pk.load(larger, path)
    assert is_shared(kind, larger) and len(adapters(larger)) == 3
    name = SHARING[kind][1][0]
    with pytest.raises(MismatchError, match=rf"missing \(3\)(?s:.)*0\.{name}"):
        pk.load(net(), path, ignore=f"shared.{name}")


@kinds
def test_two_wraps_of_one_name_are_two_shares(kind: str, tmp_path: Path) -> None:
    model, options = net(), SHARING[kind][0]
    pk.wrap(model, kind, targets=["0", "2"], **options)
    pk.wrap(model, kind, targets="3", **options)
    train(model)
    first, second, third = adapters(model)
    twin = net()
    pk.load(twin, pk.save(model, tmp_path / "a.safetensors"))
    for name in SHARING[kind][1]:
        assert first.get_parameter(name) is second.get_parameter(name) is not third.get_parameter(name)
        one, two, three = (own.get_parameter(name) for own in adapters(twin))
        assert one is two is not three
    assert torch.equal(twin(X), model(X))


def test_the_key_of_a_shared_tensor_is_no_other_s(tmp_path: Path) -> None:
    """Not where a layer is called as it would be, nor for two of one name."""
    model = nn.ModuleDict({"shared": nn.Linear(8, 8), "other": nn.Linear(8, 8), "third": nn.Linear(8, 8)})
    rules = [pk.Rule("*", "vb-lora", **SHARING["vb-lora"][0])]
    pk.wrap(model, rules=rules)
    train(model)
    path = pk.save(model, tmp_path / "a.safetensors")
    assert [key for key in load_file(path) if key.endswith("bank") or ".bank." in key] == ["shared.bank.1"]
    twin = nn.ModuleDict({name: nn.Linear(8, 8) for name in model})
    pk.load(twin, path, other_base=True)
    for name in model:
        own, other = (each[name].adapters["default"] for each in (twin, model))  # type: ignore[index]
        assert torch.equal(own.bank, other.bank)


@kinds
def test_swap_writes_to_the_shared_parameter(kind: str, tmp_path: Path) -> None:
    first, second = trained(kind), wrapped(kind)
    train(second, seed=7)
    path = pk.save(second, tmp_path / "a.safetensors")
    held = pk.adapter_parameters(first)
    pk.swap(first, path)
    assert torch.equal(first(X), second(X)) and is_shared(kind, first)
    assert all(own is other for own, other in zip(held, pk.adapter_parameters(first), strict=True))
    model, options = net(), SHARING[kind][0]
    for target in ("0", "2", "3"):
        pk.wrap(model, kind, targets=target, **options)
    train(model)
    before = first(X)
    with pytest.raises(MismatchError, match=r"other numbers for 2\.\w+ than for 0\.\w+, which are one parameter"):
        pk.swap(first, pk.save(model, tmp_path / "b.safetensors"))
    assert torch.equal(first(X), before)


@kinds
def test_a_full_checkpoint_fills_the_shared_parameter(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    path = write(tmp_path / "full.safetensors", state)
    twin = wrapped(kind)
    pk.load(twin, path)
    assert torch.equal(twin(X), model(X)) and is_shared(kind, twin)
    apart = net()
    for site in ("0", "2", "3"):
        pk.wrap(apart, kind, targets=site, **SHARING[kind][0])
    with pytest.raises(MismatchError, match=r"unexpected \(\d\)(?s:.)*the model has no such adapter"):
        pk.load(twin, write(tmp_path / "apart.safetensors", apart.state_dict()))


@kinds
def test_a_state_dict_of_the_model_has_it_once(kind: str, tmp_path: Path) -> None:
    """Under the name that named_parameters gives it, whichever layer was wrapped first, as safetensors take it."""
    model = net()
    pk.wrap(model, kind, targets=["3", "0", "2"], **SHARING[kind][0])
    train(model)
    state = model.state_dict()
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} <= {*state}
    for name in SHARING[kind][1]:
        assert [key for key in state if key.endswith(f".{name}")] == [f"0.adapters.default.{name}"]
        assert [key for key in pk.adapter_state_dict(model) if key.endswith(f".{name}")] == [f"0.{name}"]
        assert all(name in own.state_dict() for own in adapters(model))
    save_file(state, tmp_path / "state.safetensors")
    twin = wrapped(kind)
    twin.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(twin(X), model(X))
    part = model[3].state_dict()  # has all that it takes, whatever came before
    other = wrapped(kind)[3]
    other.load_state_dict(part)
    assert torch.equal(other(X), model[3](X))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    repeated = {f"2.adapters.default.{name}": adapters(model)[1].get_parameter(name) for name in SHARING[kind][1]}
    twin.load_state_dict({**state, **repeated}, strict=False)
    del state[f"0.adapters.default.{SHARING[kind][1][0]}"]
    with pytest.raises(RuntimeError, match=f"Missing key.*{SHARING[kind][1][0]}"):
        twin.load_state_dict(state)


@kinds
def test_other_programs_read_each_layer_as_a_lora(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    path = pk.save(model, tmp_path / "a.safetensors")
    base = write(tmp_path / "base.safetensors", net().state_dict())
    pk.convert(path, tmp_path / "lora.safetensors", kind="lora", base=base)
    for file in (tmp_path / "lora.safetensors", pk.export(model, tmp_path / "peft", target="peft").path):
        twin = net()
        pk.load(twin, file, other_base=True)
        torch.testing.assert_close(twin(X), model(X), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema": 3}, "schema 3"),
        ({"schema": 1}, "no adapter in the header has it"),
        ({"common": None}, "a dict was expected"),
        ({"common": {}}, "common is"),
        ({"common": {"shared.bank": "0.bank"}}, "common is"),
        ({"common": {"shared.bank": ["0.bank", "0.bank"]}}, "twice"),
        ({"common": {"shared.bank": ["9.bank"]}}, r"9\.bank.*no adapter"),
        ({"common": {"shared.none": ["0.bank"]}}, "no tensor 'shared.none'"),
        ({"common": {"shared.bank": ["0.bank", "2.logits_up", "3.0.bank"]}}, r"2\.logits_up.*shared as well"),
        ({"common": {"shared.bank": ["0.bank", "2.bank"]}}, r"missing \(1\)(?s:.)*3\.0\.bank"),
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = pk.save(trained("vb-lora"), tmp_path / "a.safetensors")
    model = net()
    with pytest.raises(FileError, match=said):
        pk.load(model, rewrite(path, **changed))
    assert torch.equal(model(X), net()(X))


def test_what_a_kind_does_not_share_is_refused(tmp_path: Path) -> None:
    model = net()
    pk.wrap(model, "lora", rank=2)
    train(model)
    path = pk.save(model, tmp_path / "a.safetensors")
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.endswith("up")}
    tensors["shared.up"] = torch.ones(8, 2)
    common = {"shared.up": ["0.up", "2.up", "3.0.up"]}
    with pytest.raises(FileError, match="lora shares no parameter 'up'"):
        pk.load(net(), rewrite(path, tensors, schema=2, common=common))
