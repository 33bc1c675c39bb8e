"""Parameters that the adapters of one wrap have in common: one object in every verb, and a clear error where not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import Adapter
from peftkit.errors import SharedParameterError
from peftkit.wrapping.installed import installed_adapters
from tests.support.processes import distributed
from tests.support.zoo import train

#: kind -> options, and the parameters that layers of one shape share
SHARING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "vb-lora": ({"rank": 2, "vectors": 10, "length": 8}, ("bank",)),
    "tied-lora": ({"rank": 2}, ("up", "down")),
    "tiny-lora": ({"rank": 3, "size": 5}, ("vector",)),
}
kinds = pytest.mark.parametrize("kind", SHARING)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))).to(dtype)


def wrapped(kind: str, **given: Any) -> nn.Sequential:
    model = net()
    pk.wrap(model, kind, **SHARING[kind][0], **given)
    return model


def adapters(model: nn.Module, name: str = "default") -> list[Adapter]:
    return [at.adapter for at in installed_adapters(model, [name])]


def is_shared(kind: str, model: nn.Module, name: str = "default") -> bool:
    """Whether all adapters hold one parameter under each name that the kind shares."""
    every = adapters(model, name)
    return all(len({own.get_parameter(key) for own in every}) == 1 for key in SHARING[kind][1])


X = torch.linspace(-1, 1, 16).view(2, 8)


@kinds
def test_a_shared_parameter_is_counted_and_given_once(kind: str) -> None:
    options, names = SHARING[kind]
    model, before = net(), net()(X)
    planned = pk.plan(model, kind, **options)
    done = pk.wrap(model, kind, **options)
    assert torch.equal(model(X), before)
    assert is_shared(kind, model)
    held = pk.adapter_parameters(model)
    assert len(held) == len(set(held))
    groups = [p for group in pk.parameter_groups(model, lr=0.1) for p in group["params"]]
    assert {*groups} == {*held} and len(groups) == len(held)
    one = adapters(model)[0]
    shared = sum(one.get_parameter(name).numel() for name in names)
    own = sum(p.numel() for p in one.parameters()) - shared
    assert planned.parameters == done.parameters == sum(p.numel() for p in held) == shared + 3 * own
    assert [entry.parameters for entry in done.entries] == [shared + own, own, own]


@kinds
def test_training_moves_all_layers_together(kind: str) -> None:
    """The gradient of a shared parameter is the sum of those that each layer alone would give it."""
    model = wrapped(kind)
    train(model)
    alone = copy.deepcopy(model)
    for own in adapters(alone):
        for name in SHARING[kind][1]:
            setattr(own, name, nn.Parameter(own.get_parameter(name).detach().clone()))
    for each in (model, alone):
        each(X).square().sum().backward()
    for name in SHARING[kind][1]:
        parts = [own.get_parameter(name).grad for own in adapters(alone)]
        together = adapters(model)[0].get_parameter(name).grad
        assert together is not None and together.any()
        torch.testing.assert_close(together, torch.stack([part for part in parts if part is not None]).sum(0))


@contextmanager
def flag(name: str) -> Iterator[None]:
    setter: Callable[[bool], None] = getattr(torch.__future__, f"set_{name}")
    setter(True)
    try:
        yield
    finally:
        setter(False)


@kinds
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "double", "overwrite", "swap", "assign"])
def test_copies_and_moves_keep_the_sharing(kind: str, how: str) -> None:
    model = wrapped(kind)
    train(model)
    with torch.no_grad():  # a graph would hold the parameters, which a swap refuses
        expected = model(X)
    if how == "deepcopy":
        moved = copy.deepcopy(model)
    elif how == "pickle":
        moved = pickle.loads(pickle.dumps(model))
    elif how == "assign":
        moved = wrapped(kind)
        moved.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    elif how == "double":
        moved = model.double().float()
    else:
        with flag(f"{how}_module_params_on_conversion"):
            moved = model.double().float()
    assert is_shared(kind, moved)
    torch.testing.assert_close(moved(X), expected)
    count = len(pk.adapter_parameters(moved))
    assert count == len(pk.adapter_parameters(wrapped(kind)))
    train(moved, seed=5)
    assert is_shared(kind, moved) and not torch.allclose(moved(X), expected)


@kinds
def test_a_copy_of_one_adapter_alone_shares_nothing(kind: str) -> None:
    model = wrapped(kind)
    twin = copy.deepcopy(adapters(model)[0])
    for name in SHARING[kind][1]:
        assert twin.get_parameter(name) is not adapters(model)[0].get_parameter(name)


@kinds
def test_a_model_of_the_meta_device_shares_once_it_has_memory(kind: str) -> None:
    options, _ = SHARING[kind]
    model = net().to("meta")
    pk.wrap(model, kind, **options)
    model.to_empty(device="cpu").load_state_dict(net().state_dict(), strict=False)
    assert is_shared(kind, model)
    pk.reset_adapters(model)
    assert is_shared(kind, model)
    torch.testing.assert_close(model(X), net()(X))
    trained = wrapped(kind)
    train(trained)
    for assign in (False, True):
        fresh = net().to("meta")
        pk.wrap(fresh, kind, **options)
        if not assign:
            fresh.to_empty(device="cpu")
        fresh.load_state_dict(trained.state_dict(), assign=assign)
        assert is_shared(kind, fresh)
        torch.testing.assert_close(fresh(X), trained(X))


@kinds
def test_a_reset_gives_the_start_again(kind: str) -> None:
    model = wrapped(kind)
    train(model)
    assert not torch.allclose(model(X), net()(X))
    pk.reset_adapters(model)
    assert is_shared(kind, model) and torch.equal(model(X), net()(X))


@kinds
def test_a_shared_parameter_starts_as_its_options_say(kind: str) -> None:
    """Whichever layer comes first, and whatever was drawn before."""
    torch.manual_seed(1)
    first = wrapped(kind, targets=["0", "2"])
    torch.manual_seed(2)
    model = net()
    torch.randn(3)
    pk.wrap(model, kind, targets="2", **SHARING[kind][0])
    for name in SHARING[kind][1]:
        assert torch.equal(adapters(first)[0].get_parameter(name), adapters(model)[0].get_parameter(name))


@kinds
def test_another_name_has_parameters_of_its_own(kind: str) -> None:
    model = wrapped(kind)
    pk.wrap(model, kind, name="second", **SHARING[kind][0])
    assert is_shared(kind, model) and is_shared(kind, model, "second")
    assert {*pk.adapter_parameters(model, "default")}.isdisjoint(pk.adapter_parameters(model, "second"))
    train(model, name="second")
    y = model(X)
    assert pk.unwrap(model, "default")
    torch.testing.assert_close(model(X), y)
    pk.unwrap(model)
    assert torch.equal(model(X), net()(X))


@kinds
@pytest.mark.parametrize("backup", ["copy", "packed"])
def test_merge_and_restore_keep_the_sharing(kind: str, backup: str) -> None:
    model = wrapped(kind)
    train(model)
    y, before = model(X), [p.clone() for p in model.parameters()]
    pk.merge(model, backup=backup)
    torch.testing.assert_close(model(X), y)
    pk.restore(model)
    assert is_shared(kind, model)
    assert all(map(torch.equal, model.parameters(), before))


@kinds
def test_options_that_tell_parameters_apart_do(kind: str) -> None:
    model, options = net(), SHARING[kind][0]
    other = {"group": "mlp"} if kind == "tiny-lora" else {"seed": 9}
    rules = [pk.Rule("0", kind, **options), pk.Rule(["2", "3"], kind, **options, **other)]
    planned = pk.wrap(model, rules=rules)
    first, second, third = adapters(model)
    for name in SHARING[kind][1]:
        assert first.get_parameter(name) is not second.get_parameter(name)
        assert second.get_parameter(name) is third.get_parameter(name)
    assert planned.parameters == sum(p.numel() for p in pk.adapter_parameters(model))


@pytest.mark.parametrize(("shared_by", "count"), [(1, 3), (2, 2), (3, 1), (None, 1)])
def test_so_many_layers_share_one_after_another(shared_by: int | None, count: int) -> None:
    model = net()
    planned = pk.wrap(model, "tiny-lora", size=7, shared_by=shared_by)
    vectors = [own.get_parameter("vector") for own in adapters(model)]
    assert len({*vectors}) == count and planned.parameters == 7 * count
    assert shared_by != 2 or (vectors[0] is vectors[1] and vectors[1] is not vectors[2])


def test_layers_of_other_shapes_share_the_factor_that_fits() -> None:
    """B goes by outputs and A by inputs, so that a layer may share each with other layers."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8))
    planned = pk.wrap(model, "tied-lora", rank=2)
    first, second, third = adapters(model)
    assert first.get_parameter("down") is third.get_parameter("down") is not second.get_parameter("down")
    assert second.get_parameter("up") is third.get_parameter("up") is not first.get_parameter("up")
    assert planned.parameters == 2 * (8 + 6) * 2 + (6 + 8 + 8) + 3 * 2


def test_an_adapter_inside_another_shares_too() -> None:
    model = net()
    inner = SHARING["vb-lora"][0]
    planned = pk.wrap(model, "vb-lora", decompose=True, **inner)
    assert len({own.get_parameter("inner.bank") for own in adapters(model)}) == 1
    assert planned.parameters == sum(p.numel() for p in pk.adapter_parameters(model))
    assert copy.deepcopy(model)(X).equal(model(X))


@kinds
def test_a_layer_whose_adapter_goes_leaves_what_it_shares_to_the_others(kind: str) -> None:
    model = wrapped(kind)
    train(model)
    pk.resize_(model, {"0": 0})
    held = {name for name, p in model.named_parameters() if p.requires_grad}
    assert held and held <= {*model.state_dict()}
    twin = net()
    pk.wrap(twin, kind, targets=["2", "3"], **SHARING[kind][0])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))


@kinds
def test_what_has_come_apart_is_refused(kind: str, tmp_path: Path) -> None:
    model, name = wrapped(kind), SHARING[kind][1][0]
    train(model)
    setattr(adapters(model)[1], name, nn.Parameter(adapters(model)[1].get_parameter(name).detach().clone()))
    for verb in (
        lambda: pk.adapter_parameters(model),
        lambda: pk.parameter_groups(model, lr=0.1),
        lambda: pk.save(model, tmp_path / "a.safetensors"),
    ):
        with pytest.raises(SharedParameterError, match=rf"'{name}'.* one parameter on 0 and another on 2.*fully_shard"):
            verb()
    assert not list(tmp_path.iterdir())


# -- several processes ------------------------------------------------------------------------------------------------


def _trained(model: nn.Module) -> list[Tensor]:
    """The adapters' parameters after two steps, on inputs that differ from process to process."""
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        (model(X + torch.distributed.get_rank() + step) - 1).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in pk.adapter_parameters(model)]


def _steps(folder: Path) -> list[Any]:
    """Training under DDP, wrapped before and after fully_shard, and what the blocks sharded one by one raise."""
    from torch.distributed.fsdp import fully_shard

    base = wrapped("vb-lora")
    train(base)
    start = pk.save(base, folder / f"start{torch.distributed.get_rank()}.safetensors")
    ddp, before, after, apart = (net() for _ in range(4))
    pk.load(ddp, start)
    _trained_by_ddp = nn.parallel.DistributedDataParallel(ddp)
    found = [_trained(_trained_by_ddp)]
    pk.load(before, start)
    fully_shard(before)
    found.append(_trained(before))
    pk.save(before, folder / "sharded.safetensors")
    fully_shard(after)
    pk.load(after, start)
    found.append(_trained(after))
    pk.load(apart, start)
    for block in (*apart, apart):
        if not isinstance(block, nn.Tanh):
            fully_shard(block)
    try:
        pk.adapter_parameters(apart)
    except SharedParameterError as error:
        return [*found, "call it once on the whole model" in str(error)]
    return found


@pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard is public from torch 2.6 on")
@pytest.mark.processes
def test_training_in_several_processes(tmp_path: Path) -> None:
    one, other = distributed(_steps, tmp_path, folder=tmp_path)
    *found, said = one
    assert said is True and len(found) == 3
    for way in (*found[1:], *other[:3]):
        torch.testing.assert_close(way, found[0])
    model = net()
    pk.load(model, tmp_path / "sharded.safetensors")
    assert is_shared("vb-lora", model)
    torch.testing.assert_close([p.detach() for p in pk.adapter_parameters(model)], found[0])
