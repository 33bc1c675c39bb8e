"""Other ranks for adapters that are on a model: ΔW stays where it can, γ always."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.adapters import Adapter, registry
from peftkit.errors import MergeStateError, OptionError, TargetError, UnknownAdapterError
from tests.support.zoo import make, target_of, train

HAVE = [kind for kind in registry.kinds() if "rank" in registry.option_names(registry.get(kind))]
RANKED = [kind for kind in HAVE if not registry.get(kind).shares]


def model_of(kind: str = "lora", **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Conv1d(1, 6, 3), nn.Linear(8, 8)).double()
    pk.wrap(model, kind, targets=["0", "2"], **options)
    return model


def adapter(model: nn.Module, layer: int) -> Any:
    return model[layer].adapters["default"]  # type: ignore[index]


def matrix(model: nn.Module, layer: int) -> torch.Tensor:
    at: Adapter = adapter(model, layer)
    return at.eval()(model[layer].weight, 1.0).dense().detach()  # type: ignore[index]


@pytest.mark.parametrize("kind", RANKED)
def test_every_kind_with_a_rank_takes_another_before_training(kind: str) -> None:
    """It is then what it would be with that rank from the start: a wrapped model trains and merges."""
    options: dict[str, Any] = {"rank": 2} | ({"block": 1} if kind == "dylora" else {})
    model, x = model_of(kind, **options), torch.ones(2, 12, dtype=torch.float64)
    before = model[0](x)
    assert pk.resize_(model, {"0": 4, "2": 2}) == {"0": (2, 4)}
    assert adapter(model, 0).options["rank"] == 4
    assert torch.equal(model[0](x), before)
    first, second = vars(adapter(model, 0)).get("scale"), vars(adapter(model, 2)).get("scale")
    assert first == pytest.approx(second)
    assert pk.resize_(model, {"0": 2}) == {"0": (4, 2)}
    wanted = model_of(kind, **options)
    assert [p.shape for p in pk.adapter_parameters(model)] == [p.shape for p in pk.adapter_parameters(wanted)]


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"rslora": True}, {"alpha": 0.5, "rslora": True}])
def test_a_trained_lora_keeps_what_it_can(options: dict[str, Any]) -> None:
    model = model_of(rank=5, **options)
    train(model)
    before, other, x = matrix(model, 0), matrix(model, 2), torch.randn(3, 12, dtype=torch.float64)
    out = model[0](x)
    assert pk.resize_(model, {"0": 7}) == {"0": (5, 7)}
    assert torch.allclose(model[0](x), out, atol=1e-12) and torch.allclose(matrix(model, 0), before, atol=1e-12)
    pk.resize_(model, {"0": 3})
    lost = (matrix(model, 0) - before).norm()
    assert torch.isclose(lost, torch.linalg.svdvals(before)[3:].norm(), rtol=1e-9)
    assert torch.equal(matrix(model, 2), other)
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
    (model[0](x).square().sum() + model[2](x[:, :8]).sum()).backward()
    optimizer.step()
    assert not torch.allclose(model[0](x), out)


def test_ranks_without_a_gate_go_without_a_change() -> None:
    model = model_of("svdlora", rank=6)
    train(model)
    with torch.no_grad():
        adapter(model, 0).gate[[1, 4]] = 0
    before = matrix(model, 0)
    pk.resize_(model, {"0": 4})
    assert len(adapter(model, 0).gate) == 4 and torch.equal(matrix(model, 0), before)
    pk.resize_(model, {"0": 9})
    assert torch.allclose(matrix(model, 0), before)


def test_rank_0_takes_an_adapter_off_its_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    plain = copy.deepcopy(model)
    pk.wrap(model, "lora", rank=2)
    pk.wrap(model, "loha", rank=2, name="other", targets="1")
    assert pk.resize_(model, {"0.q_proj": 0, "0.k_proj": 3, "1": 0}, name="default") == {
        "0.q_proj": (2, 0),
        "0.k_proj": (2, 3),
        "1": (2, 0),
    }
    names = set(pk.adapter_state_dict(model, "default"))
    assert {n.rpartition(".")[0] for n in names} == {"0.k_proj", "0.v_proj", "0.out_proj"}
    x = torch.randn(3, 1, 8)
    assert torch.equal(model[0](x, x, x)[0], plain[0](x, x, x)[0]) and "other" in model[1].adapters  # type: ignore[operator]
    pk.unwrap(model, "other")
    assert type(model[1]) is nn.Linear
    pk.unwrap(model)
    assert all(p.requires_grad for p in model.parameters()) and type(model[0]) is nn.MultiheadAttention


def test_an_adapter_that_layers_share_stays_shared() -> None:
    tied = nn.ModuleDict({"e": nn.Embedding(9, 6), "h": nn.Linear(6, 9, bias=False)})
    tied["h"].weight = tied["e"].weight  # type: ignore[union-attr]
    pk.wrap(tied, "lora", rank=2, targets=["e", "h"], tied="share")
    pk.resize_(tied, {"e": 3})
    assert tied["e"].adapters["default"] is tied["h"].adapters["default"]  # type: ignore[union-attr]
    with pytest.raises(TargetError, match="default is not on 'h'"):
        pk.resize_(tied, {"h": 3})


@pytest.mark.parametrize("layer", ["conv2d g2 d2", "embedding"])
def test_untypical_layers(layer: str) -> None:
    module, x = make(layer)
    pk.wrap(module, "lora", targets=target_of(module), rank=2)
    train(module)
    before = module(x)
    site = next(iter(pk.adapter_state_dict(module))).rpartition(".")[0]
    assert pk.resize_(module, {site: 3}) == {site: (2, 3)}
    assert torch.allclose(module(x), before, atol=1e-6)


@pytest.mark.parametrize(
    "ranks, error, message",
    [
        ({"one": 3}, TargetError, "default is not on 'one'"),
        ({"0": 0, "2": 0}, TargetError, r"pk.unwrap\(model, 'default'\) takes it off"),
        ({"0": -1}, OptionError, "0: rank=-1 was given"),
        ({"0": True}, OptionError, "0: rank=True"),
        ({"0": 4, "2": 99}, OptionError, "2: anchored: rank=99 was given, at most 8"),
    ],
)
def test_what_cannot_be_changes_nothing(ranks: Any, error: type[Exception], message: str) -> None:
    model = model_of("anchored", rank=2)
    held = list(map(id, pk.adapter_parameters(model)))
    with pytest.raises(error, match=message):
        pk.resize_(model, ranks)
    assert list(map(id, pk.adapter_parameters(model))) == held


def test_kinds_that_cannot_keep_their_change_say_so() -> None:
    model = model_of("loha", rank=2)
    train(model)
    with pytest.raises(OptionError, match="loha has been trained, and its numbers at rank 2"):
        pk.resize_(model, {"0": 3})
    for shared in set(HAVE) - set(RANKED):
        with pytest.raises(OptionError, match=f"layers share the numbers of {shared}"):
            pk.resize_(model_of(shared, rank=2), {"0": 3})
    with pytest.raises(OptionError, match="ia3 was wrapped without a rank"):
        pk.resize_(model_of("ia3"), {"0": 3})
    with pytest.raises(UnknownAdapterError, match="no adapter on this model is called 'style'"):
        pk.resize_(model, {"0": 3}, name="style")
    merged = model_of(rank=2)
    train(merged)
    pk.merge(merged)
    with pytest.raises(MergeStateError, match="restore before resizing"):
        pk.resize_(merged, {"0": 3})


def test_modes_and_flags_stay_and_a_kind_without_a_rank_is_taken_off() -> None:
    model = model_of(rank=2)
    adapter(model, 0).eval()
    adapter(model, 0).down.requires_grad_(False)
    pk.resize_(model, {"0": 3, "2": 3})
    assert not adapter(model, 0).training and adapter(model, 2).training
    assert [p.requires_grad for p in adapter(model, 0).parameters()] == [True, False]
    whole = model_of("full")
    assert pk.resize_(whole, {"0": 0}) == {"0": (10, 0)} and type(whole[0]) is nn.Linear
    with pytest.raises(OptionError, match="a rank for each weight was expected"):
        pk.resize_(model, [("0", 4)])  # type: ignore[arg-type]
