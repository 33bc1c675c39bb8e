"""tied="share": one adapter on an embedding and the head that is tied to it, through every verb."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import (
    FileError,
    MergeStateError,
    MismatchError,
    OptionError,
    TiedWeightsError,
    UnsupportedLayerError,
)
from tests.support.models import language_model
from tests.support.zoo import train

IDS = torch.tensor([[1, 2, 3, 3], [11, 0, 5, 4]])


class Tied(nn.Module):
    """An embedding and a head of one weight, with a layer between them."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


def tied(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def shared(kind: str = "lora", targets: Any = "embed", **options: Any) -> Tied:
    model = tied()
    pk.wrap(model, kind, targets=targets, tied="share", **(options or ({"rank": 2} if kind == "lora" else {})))
    train(model)
    return model


@pytest.mark.parametrize("targets", ["embed", "head", ["Embedding", "Linear"]])
def test_one_adapter_is_on_both_whichever_is_named(targets: Any) -> None:
    model = tied()
    before = model(IDS)
    plan = pk.wrap(model, "lora", targets=targets, tied="share", rank=2)
    assert {"embed", "head"} <= set(plan.modules)
    assert plan.shared == {"head": "embed"}
    assert torch.equal(model(IDS), before)
    assert model.embed.adapters["default"] is model.head.adapters["default"]
    assert plan.parameters == sum(p.numel() for p in pk.adapter_parameters(model))
    assert pk.check(model, IDS).ok


@pytest.mark.parametrize(
    ("kind", "options"), [("lora", {"rank": 2}), ("lokr", {"factor": 4}), ("dora", {"rank": 2}), ("full", {})]
)
@pytest.mark.parametrize("backup", ["copy", "packed", None])
def test_the_weight_gets_the_change_once_and_stays_tied(kind: str, options: dict[str, Any], backup: str | None) -> None:
    model = shared(kind, **options)
    before, y = model.embed.weight.clone(), model(IDS)
    report = pk.merge(model, backup=backup)
    assert len(report.weights) == 1
    assert model.embed.weight is model.head.weight
    torch.testing.assert_close(model(IDS), y)
    if backup is None:
        assert type(model.head) is nn.Linear
        return
    pk.restore(model)
    assert torch.equal(model.embed.weight, before)
    torch.testing.assert_close(model(IDS), y)
    pk.merge(model)
    pk.unwrap(model, keep_merged=True)
    assert model.embed.weight is model.head.weight
    torch.testing.assert_close(model(IDS), y)


def test_gradients_come_from_both_places() -> None:
    model = shared()
    adapter = model.embed.adapters["default"]
    (gradient,) = torch.autograd.grad(model(IDS).square().sum(), adapter.up)
    with torch.no_grad():
        weight = nn.Parameter(model.embed.weight + adapter(model.embed.weight, 1.0).dense())
    plain = tied()
    plain.embed.weight = plain.head.weight = weight
    (whole,) = torch.autograd.grad(plain(IDS).square().sum(), weight)
    torch.testing.assert_close(gradient, whole @ adapter.down.mT)


def test_a_file_holds_it_once_and_says_where_it_goes(tmp_path: Path) -> None:
    model = shared()
    path = pk.save(model, tmp_path / "a.safetensors")
    assert set(load_file(path)) == {"embed.up", "embed.down"}
    fresh = tied()
    assert set(pk.load(fresh, path).loaded) == {"embed", "head"}
    assert fresh.embed.adapters["default"] is fresh.head.adapters["default"]
    assert torch.equal(fresh(IDS), model(IDS))
    pk.merge(fresh)
    torch.testing.assert_close(fresh(IDS), model(IDS))


def test_of_a_model_that_is_tied_no_more_both_weights_are_changed(tmp_path: Path) -> None:
    model = shared()
    path = pk.save(model, tmp_path / "a.safetensors")
    apart = Tied(tied=False)
    apart.load_state_dict(tied().state_dict())
    pk.load(apart, path)
    torch.testing.assert_close(apart(IDS), model(IDS))
    pk.merge(apart)
    torch.testing.assert_close(apart(IDS), model(IDS))
    pk.restore(apart)


@pytest.mark.parametrize("both", [True, False])
def test_a_checkpoint_is_merged_with_one_tensor_or_with_two(both: bool, tmp_path: Path) -> None:
    model = shared()
    path = pk.save(model, tmp_path / "a.safetensors")
    base = {key: value.clone() for key, value in tied().state_dict().items() if both or key != "head.weight"}
    save_file(base, tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {path: 1.0}, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    pk.merge(model)
    for key in base:
        torch.testing.assert_close(found[key], model.state_dict()[key])


def test_other_files_go_on_both_with_share_and_are_refused_without(tmp_path: Path) -> None:
    apart = Tied(tied=False)
    apart.load_state_dict(tied().state_dict())
    pk.wrap(apart, "lora", targets="embed", rank=2)
    train(apart)
    path = pk.save(apart, tmp_path / "a.safetensors")
    with pytest.raises(TiedWeightsError, match="tied='share' to put its adapter on both"):
        pk.load(tied(), path)
    model = tied()
    pk.load(model, path, tied="share")
    assert model.head.adapters["default"] is model.embed.adapters["default"]
    pk.wrap(apart, "lora", targets="head", rank=2)
    train(apart, seed=3)
    path = pk.save(apart, tmp_path / "b.safetensors")
    with pytest.raises(MismatchError, match="embed and head are one weight in the model"):
        pk.load(tied(), path, tied="share")


def test_swap_copies_pickles_state_dicts_and_strength(tmp_path: Path) -> None:
    model = shared()
    y = model(IDS)
    path = pk.save(model, tmp_path / "a.safetensors")
    assert torch.equal(copy.deepcopy(model)(IDS), y)
    other = shared("lora", rank=2)
    train(other, seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), y)
    train(other, seed=9)
    pk.swap(other, path)
    assert torch.equal(other(IDS), y)
    pk.set_strength(model, 0.5)
    z = model(IDS)
    pk.merge(model)
    torch.testing.assert_close(model(IDS), z)
    with pytest.raises(MergeStateError):
        pk.merge(model)


def test_a_second_adapter_is_merged_beside_it_or_on_top() -> None:
    model = shared()
    pk.wrap(model, "full", targets="head", tied="share", name="second")
    train(model, seed=4, name="second")
    y = model(IDS)
    pk.merge(model, "default")
    torch.testing.assert_close(model(IDS), y)
    pk.restore(model)
    pk.merge(model)
    torch.testing.assert_close(model(IDS), y)


def test_what_cannot_be_shared_is_refused() -> None:
    model = tied()
    with pytest.raises(TiedWeightsError, match="tied='share' to put one adapter on both"):
        pk.wrap(model, "lora", targets="embed", rank=2)
    rules = [pk.Rule("embed", "lora", rank=2), pk.Rule("head", "lora", rank=3)]
    with pytest.raises(OptionError, match="embed and head are one weight, which two rules adapt"):
        pk.wrap(model, rules=rules, tied="share")
    model.register_parameter("other", model.embed.weight)
    with pytest.raises(UnsupportedLayerError, match="not all of these are layers"):
        pk.wrap(model, "lora", targets="embed", tied="share", rank=2)
    assert type(model.embed) is nn.Embedding


def test_a_language_model_is_trained_merged_and_read_back_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = language_model(tied=True)
    pk.wrap(model, "lora", targets=["attn-mlp", "*.embed_tokens"], tied="share", rank=2)
    optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=0.1)
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y = model(IDS).logits
    model.tie_weights()
    pk.export(model, tmp_path / "peft", "peft")
    pk.merge(model)
    pk.unwrap(model, keep_merged=True)
    torch.testing.assert_close(model(IDS).logits, y, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert back.lm_head.weight is back.model.embed_tokens.weight
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits)
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merging tied weights, which is not done here
        theirs = peft.PeftModel.from_pretrained(language_model(tied=True), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(IDS).logits, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", [["embed", 0], ["nothing", False], "embed", [], None, {"embed": True}])
def test_a_header_that_shares_nonsense_is_refused(damage: Any, tmp_path: Path) -> None:
    path = pk.save(shared(), tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["peftkit"])
    assert header["shared"] == {"head": ["embed", False]}
    header["shared"] = {"head": damage}
    save_file(load_file(path), path, {"peftkit": json.dumps(header)})
    with pytest.raises(FileError, match="it is damaged"):
        pk.read(path)
