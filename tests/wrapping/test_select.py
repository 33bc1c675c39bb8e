"""What patterns select and what they say when they select nothing: suffixes, hints, other libraries' names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import OptionError, TargetError, UnsupportedLayerError, did_you_mean


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout()])


def net() -> nn.Module:
    blocks = [nn.ModuleDict({"attn": Attention(), "norm": nn.LayerNorm(8)}) for _ in range(4)]
    return nn.ModuleDict({"embed": nn.Embedding(5, 8), "blocks": nn.ModuleList(blocks), "head": nn.Linear(8, 5)})


def selected(model: nn.Module, *targets: str, **kwargs: Any) -> tuple[str, ...]:
    return pk.plan(model, "lora", targets=targets, rank=1, **kwargs).modules


@pytest.mark.parametrize("suffix", ["to_q", "attn.to_q", "to_out.0"])
def test_the_end_of_a_name_selects_every_layer_that_ends_so(suffix: str) -> None:
    assert (
        selected(net(), suffix)
        == tuple(f"blocks.{i}.attn.{suffix.removeprefix('attn.')}" for i in range(4))
        == selected(net(), f"*.{suffix}")
    )


def test_a_whole_name_and_a_class_come_before_the_end_of_a_name() -> None:
    model = nn.ModuleDict(
        {"Linear": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2), "Linear": Attention()})}
    )
    assert selected(model, "Linear") == ("Linear",)
    assert "a.b" in selected(nn.ModuleDict({"a": model["a"]}), "Linear")


def test_the_end_of_a_name_excludes_too() -> None:
    assert not [name for name in selected(net(), "full", exclude="to_q") if name.endswith("to_q")]


def test_the_end_of_a_name_says_why_it_selects_nothing() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"blocks\.0\.norm: lora adapts matrices, and this is a vector"):
        selected(net(), "norm")
    projections = nn.ModuleDict({"block": nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})})
    assert selected(projections, "q_proj") == ("block.attn.q_proj",)


@pytest.mark.parametrize(
    "pattern", ["to_p", "to_qq", "Atention", "blocks.0.attn.to", "emded", "LayerNorn", "attn-onyl"]
)
def test_a_hint_names_each_thing_once_and_only_what_can_be_adapted(pattern: str) -> None:
    model = net()
    with pytest.raises(TargetError) as caught:
        selected(model, pattern)
    _, _, hint = str(caught.value).partition("of the model.")
    hints = [word for word in hint.split("'")[1::2] if word]
    assert hints
    assert len(set(hints)) == len(hints)
    for each in hints:
        assert selected(model, each), f"{each} is proposed and selects nothing"


def test_a_hint_for_the_name_of_modules_inside() -> None:
    with pytest.raises(TargetError, match=r"matched by '\*\.attn\.\*'"):
        selected(net(), "attn")
    assert len(selected(net(), "*.attn.*")) == 12


def test_did_you_mean_names_a_word_once() -> None:
    assert did_you_mean("to_p", ["to_q"] * 3) == " Did you mean 'to_q'?"


def test_a_plan_of_a_wrapped_model_is_that_of_the_model() -> None:
    class Gated(pk.Adapter):
        """An adapter with a layer of its own, which is no layer of the model."""

        def __init__(self, shape: Any, weight: torch.Tensor) -> None:
            super().__init__()
            self.gate = nn.Linear(2, 2)

        def delta(self, weight: torch.Tensor) -> Any:
            raise NotImplementedError

    model, bare = net(), net()
    pk.wrap(model, "lora", rank=1)
    model["head"].adapters["other"] = Gated(None, torch.empty(0))
    for targets in ("*", "full", "Linear"):
        ours, plain = (pk.plan(m, "loha", targets=targets, rank=1, name="second") for m in (model, bare))
        assert ours.modules == plain.modules
        assert ours.skipped == plain.skipped
    for name in ("AdaptedLinear", "AdaptedLayer", "LoRA", "Gated"):
        with pytest.raises(TargetError, match="matches no layer"):
            selected(model, name, name="second")


@pytest.mark.parametrize(
    "kind, option, said",
    [
        ("lora", {"r": 8}, "r=8 was given, a name of PEFT: here it is rank="),
        ("dora", {"r": 8}, "here it is rank="),
        ("oft", {"r": 8}, "here it is blocks="),
        ("lora", {"lora_alpha": 16}, "here it is alpha="),
        ("lora", {"network_alpha": 16}, "here it is alpha="),
        ("lora", {"network_dim": 16}, "a name of kohya's sd-scripts: here it is rank="),
        ("lora", {"lora_dropout": 0.1}, "here it is dropout="),
        (
            "lora",
            {"target_modules": ["q_proj"]},
            "target_modules=['q_proj'] was given, a name of PEFT: here it is targets=",
        ),
        ("lora", {"use_dora": True}, "here it is decompose="),
        ("lora", {"rank_pattern": {}}, "give rules=[Rule(targets, kind, rank=…), …]"),
        ("lora", {"modules_to_save": ["head"]}, "requires_grad_(True)"),
    ],
    ids=str,
)
def test_names_of_other_libraries_are_translated(kind: str, option: dict[str, Any], said: str) -> None:
    for refuse in (lambda: pk.wrap(net(), kind, **option), lambda: pk.Rule("head", kind, **option)):
        with pytest.raises(OptionError) as caught:
            refuse()
        assert said in str(caught.value)
        assert str(caught.value).startswith(kind)


def test_an_option_of_the_adapters_own_is_not_translated() -> None:
    assert pk.Rule("head", "lora", rank=2, alpha=1.0, dropout=0.1).options == {"rank": 2, "alpha": 1.0, "dropout": 0.1}


def test_all_linear_is_translated() -> None:
    with pytest.raises(TargetError, match="PEFT's 'all-linear' is 'full' here"):
        selected(net(), "all-linear")
