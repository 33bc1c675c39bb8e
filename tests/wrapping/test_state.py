"""What other code does to an adapted model between wrap and merge: each step is right, warned of, or a typed error."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import (
    LostAdapterError,
    MergeStateError,
    NeverRanWarning,
    TiedWeightsError,
    UnsupportedLayerError,
)
from tests.support.processes import distributed
from tests.support.zoo import train


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def trained(model: nn.Module, **options: object) -> nn.Module:
    pk.wrap(model, "lora", rank=2, **options)
    train(model)
    return model


class Tied(nn.Module):
    """An output head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class Fused(nn.Module):
    """A head whose weight goes into a fused function, and whose layer is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.head.weight)


# -- state dicts while adapters are merged -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, "a"])
def test_the_state_dict_of_a_merged_model_is_that_of_its_weights(names: str | None) -> None:
    model, x = network(), torch.randn(3, 8)
    for name in ("a", "b"):
        trained(model, name=name)
    expected = model(x)
    pk.merge(model, names)
    state = model.state_dict()
    kept = {key.split(".adapters.")[1].partition(".")[0] for key in state if ".adapters." in key}
    assert kept == (set() if names is None else {"b"})
    plain = network()
    plain.load_state_dict({key: tensor for key, tensor in state.items() if ".adapters." not in key})
    if names is None:
        assert torch.allclose(plain(x), expected, atol=1e-6)
    pk.restore(model)
    assert any(".adapters.a." in key for key in model.state_dict())


def test_the_state_dict_of_a_merged_model_does_not_count_twice_in_a_wrapped_one() -> None:
    model, twin, x = trained(network()), network(), torch.randn(3, 8)
    pk.wrap(twin, "lora", rank=2)
    expected = model(x)
    pk.merge(model)
    with pytest.raises(RuntimeError, match=r"adapters\.default"):
        twin.load_state_dict(model.state_dict())
    twin.load_state_dict(model.state_dict(), strict=False)  # a fresh adapter changes nothing
    assert torch.allclose(twin(x), expected, atol=1e-6)


def test_nothing_is_loaded_over_a_merged_weight() -> None:
    model = trained(network())
    state = copy.deepcopy(model.state_dict())
    pk.merge(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(MergeStateError, match="restore"):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    pk.restore(model)
    model.load_state_dict(state)


# -- layers that are replaced ------------------------------------------------------------------------------------------


def test_a_replaced_layer_is_missed_by_save_export_and_merge(tmp_path: Path) -> None:
    model = trained(network())
    model[2] = nn.Linear(16, 6)
    for verb in (
        lambda: pk.save(model, tmp_path / "a.safetensors"),
        lambda: pk.export(model, tmp_path / "b.safetensors", target="lycoris"),
        lambda: pk.merge(model),
    ):
        with pytest.raises(LostAdapterError, match=r"^2 was adapted"):
            verb()
    assert not list(tmp_path.iterdir())
    pk.wrap(model, "lora", rank=2, targets="2")  # as the message says
    pk.save(model, tmp_path / "a.safetensors")
    pk.merge(model)


def test_a_layer_that_was_taken_away_and_put_back_is_not_missed() -> None:
    model = trained(network())
    layer = model[2]
    model[2] = nn.Identity()
    with pytest.raises(LostAdapterError):
        pk.merge(model)
    model[2] = layer
    pk.merge(model)


def test_what_was_unwrapped_is_not_missed(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": network(), "two": network()})
    trained(model)
    pk.unwrap(model["one"])
    pk.save(model, tmp_path / "two.safetensors")
    copied = copy.deepcopy(model)
    pk.unwrap(model)
    trained(model, targets="one.0")
    pk.merge(model)
    pk.merge(copied)


# -- weights that are tied, read, divided or reparametrised ------------------------------------------------------------


def test_a_weight_that_is_tied_again_is_not_merged() -> None:
    model, ids = Tied(), torch.arange(5)
    trained(model, targets="head", tied="untie")
    pk.merge(model)
    pk.restore(model)
    model.tie_weights()
    embedding, output = model.embedding.weight.clone(), model(ids)
    with pytest.raises(TiedWeightsError, match="tie_weights"):
        pk.merge(model)
    assert torch.equal(model.embedding.weight, embedding)
    assert torch.equal(model(ids), output)


def test_an_adapter_that_never_ran_is_named_at_the_first_backward_and_at_merge() -> None:
    model, x = Fused(), torch.randn(2, 8)
    trained(model)
    with pytest.warns(NeverRanWarning, match="head"):
        model(x).sum().backward()
    model(x).sum().backward()  # once is enough
    with pytest.warns(NeverRanWarning, match="head"):
        pk.merge(model)


def test_only_what_acts_is_missed() -> None:
    model, x = network(), torch.randn(2, 8)
    trained(model, name="a", targets="0")
    trained(model, name="b", targets="2")
    with pk.enabled(model, "a"):
        model(x).sum().backward()
    pk.merge(model, "a")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of torch's own
def test_compiled_parts_are_not_missed() -> None:
    model, x = network(), torch.randn(2, 8)
    trained(model)
    model[2].compile(backend="eager")
    model(x).sum().backward()
    pk.merge(model)


def test_a_reparametrised_layer_is_refused_by_name() -> None:
    model = trained(network())
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(UnsupportedLayerError, match="weight_norm"):
        model(torch.randn(2, 8))


def test_a_lazy_or_empty_layer_is_skipped_with_the_reason() -> None:
    plan = pk.plan(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)), "lora", rank=2)
    assert plan.modules == ("1",)
    assert "not initialised" in plan.skipped[0][1]
    partitioned = nn.Sequential(nn.Linear(8, 8))
    partitioned[0].weight.data = torch.empty(0)
    with pytest.raises(UnsupportedLayerError, match="ZeRO-3"):
        pk.wrap(partitioned, "lora", rank=2)


def _wrap_too_late(how: str) -> bool:
    """Whether wrap refuses a model that is averaged, or a copy of a weight that is divided, and leaves it as it was."""
    from torch.distributed.fsdp import fully_shard

    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain[1].weight = plain[0].weight
    model = {"shard": fully_shard, "average": nn.parallel.DistributedDataParallel}[how](plain)
    message = {"shard": "tied='untie' was given", "average": "wrap or load first, then Distributed"}[how]
    with pytest.raises(UnsupportedLayerError, match=message):
        pk.wrap(model, "lora", rank=2, tied="untie")
    return not any("adapters" in name for name, _ in model.named_modules())


@pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard is public from torch 2.6 on")
@pytest.mark.processes
@pytest.mark.parametrize("how", ["shard", "average"])
def test_a_model_that_is_averaged_or_of_which_a_divided_weight_would_be_copied_is_not_wrapped(
    how: str, tmp_path: Path
) -> None:
    assert distributed(_wrap_too_late, how, folder=tmp_path) == [True, True]
