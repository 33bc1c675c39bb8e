"""Wrapping: what it selects, what it leaves alone, and that it can be taken back without a trace."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

import peftkit as pk
from peftkit.adapters import registry
from peftkit.errors import (
    DuplicateNameError,
    MergeStateError,
    OptionError,
    TargetError,
    TiedWeightsError,
    UnknownAdapterError,
    UnsupportedLayerError,
)
from peftkit.wrapping.installed import adapted_modules
from tests.support.zoo import ADAPTERS, train


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Transformer(nn.Module):
    """Embedding, two blocks of attention and feed-forward, a normalisation and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": Attention(width), "mlp": FeedForward(width)}) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["attn"](x)
            x = x + block["mlp"](x)
        return self.head(self.norm(x))


TOKENS = torch.tensor([[0, 1, 2], [3, 4, 0]])


@pytest.fixture
def net() -> Transformer:
    torch.manual_seed(0)
    return Transformer()


def selected(net: nn.Module, *targets: str, **kwargs: Any) -> list[str]:
    return list(pk.plan(net, "lora", targets=targets, rank=2, **kwargs).modules)


Q = ["blocks.0.attn.to_q", "blocks.1.attn.to_q"]
ATTENTION = [f"blocks.{i}.attn.to_{p}" for i in range(2) for p in ("q", "k", "v", "out")]
MLP = [f"blocks.{i}.mlp.{p}" for i in range(2) for p in ("up", "down")]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["blocks.0.attn.to_q"], Q[:1]),
        (["*.to_q"], Q),
        (["to_q"], Q),
        (["attn.to_q"], Q),
        (["*.to_[qk]"], [n for n in ATTENTION if n[-1] in "qk"]),
        ([r"re:blocks\.\d\.attn\.to_q"], Q),
        (["Attention"], ATTENTION),
        (["blocks.1"], [n for n in [*ATTENTION, *MLP] if n.startswith("blocks.1.")]),
        (["attn-only"], ATTENTION),
        (["attn-mlp"], [*ATTENTION, *MLP]),
        (["head", "*.to_q"], [*Q, "head"]),
    ],
    ids=str,
)
def test_targets(net: Transformer, targets: list[str], expected: list[str]) -> None:
    assert sorted(selected(net, *targets)) == sorted(expected)


def test_full_takes_every_layer_and_a_class_its_subclasses(net: Transformer) -> None:
    assert sorted(selected(net, "full")) == sorted([*ATTENTION, *MLP, "head"]) == sorted(selected(net, "Linear"))


def test_exclude(net: Transformer) -> None:
    assert selected(net, "Attention", exclude="*.to_out") == [n for n in ATTENTION if not n.endswith("out")]


@pytest.mark.parametrize(
    "targets, exclude, said",
    [
        ("*.to_qq", (), "matches no layer"),
        ("attn", (), "'*.attn.*'"),
        ("blocks.0.attn.to_p", (), "blocks.0.attn.to_"),
        ("Atention", (), "Attention"),
        ("re:(", (), "not a regular expression"),
        ("head", "heads", "matches no layer"),
        ("head", "head", "adapts nothing"),
        (["head", "head"], (), "taken by earlier"),
        ([""], (), "targets are strings"),
    ],
)
def test_a_pattern_that_selects_nothing_raises(net: Transformer, targets: Any, exclude: Any, said: str) -> None:
    with pytest.raises(TargetError, match=re.escape(said)):
        pk.wrap(net, "lora", targets=targets, exclude=exclude)
    assert not adapted_modules(net)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("target", ["slope", "*slope", "PReLU"])
def test_what_cannot_be_adapted_raises_with_the_reason(net: Transformer, target: str) -> None:
    net.add_module("slope", nn.PReLU(8))
    with pytest.raises(UnsupportedLayerError, match="is not a Linear or a convolution"):
        pk.wrap(net, "lora", targets=target)


def test_what_a_glob_skips_is_listed(net: Transformer) -> None:
    plan = pk.plan(net, "lora", targets="*")
    assert {name for name, _ in plan.skipped} == {"embed", "norm"}
    assert "skipped embed" in str(plan)
    assert f"{plan.parameters:,}" in str(plan)


def test_rules_give_each_layer_its_own_adapter_and_the_first_wins(net: Transformer) -> None:
    rules = [pk.Rule("*.to_q", "loha", rank=2), pk.Rule("Attention", "lora", rank=3), pk.Rule("head", "oft", blocks=1)]
    plan = pk.wrap(net, rules=rules)
    kinds = {e.site.name: e.kind for e in plan.entries}
    assert kinds["blocks.0.attn.to_q"] == "loha"
    assert kinds["blocks.0.attn.to_k"] == "lora"
    assert kinds["head"] == "oft"
    assert plan.parameters == sum(p.numel() for p in pk.adapter_parameters(net))


def test_plan_touches_nothing(net: Transformer) -> None:
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    for kind in pk.kinds():
        options = {"rank": 2} if "rank" in registry.option_names(registry.get(kind)) else {}
        pk.plan(net, kind, targets="Attention", **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert not adapted_modules(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("lora", {"rnak": 4}, "Did you mean 'rank'"),
        ("lora", {"factor": 4}, "'factor' is an option of lokr"),
        ("loha", {"dropout": 0.1}, "'dropout' is an option of lora"),
        ("oft", {"rank": 4}, "oft has no option 'rank'"),
        ("oft", {"decompose": True}, "depends on the base"),
        ("lora", {"axis": "in"}, "lora with decompose=True"),
        ("lora", {"rank": 0}, "a positive integer"),
        ("lora", {"rank": True}, "int was expected"),
        ("lora", {"alpha": float("nan")}, "float | None, finite was expected"),
        ("lora", {"dropout": 1.0}, "a probability"),
        ("lokr", {"factor": 0}, "a positive integer, -1"),
        ("lokr", {"full_scale": "alpha/rank"}, "an integer"),
        ("lokr", {"init": "zeros"}, "'lycoris' or 'peft'"),
        ("loldu", {"rank": 9}, "at most 8"),
        ("loldu", {"rank": 2, "init": "best"}, "s_normal"),
        ("dora", {"inner": "oft"}, "one of"),
        ("dora", {"axis": "both"}, "'out'"),
        ("dora", {"rank": 2, "factor": 3}, "lora has no option 'factor'"),
        ("oft", {"blocks": 3}, "a divisor of"),
        ("oft", {"blocks": 2, "block_size": 4}, "give one of them"),
        ("oft", {"side": "left"}, "'out' or 'in'"),
    ],
    ids=str,
)
def test_options_are_validated(net: Transformer, kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        pk.wrap(net, kind, targets=["Attention", "head"], **options)
    assert said in str(caught.value)
    assert not adapted_modules(net)


def test_unknown_kinds_and_taken_names_say_what_exists(net: Transformer) -> None:
    with pytest.raises(UnknownAdapterError, match="Did you mean 'lora'"):
        pk.wrap(net, "lorra")
    with pytest.raises(DuplicateNameError, match="LoRA"):
        pk.register("locon")(type("Mine", (pk.Adapter,), {}))
    pk.wrap(net, "lora", targets="head")
    with pytest.raises(DuplicateNameError, match="already has an adapter named 'default'"):
        pk.wrap(net, "loha", targets="head")
    for name in ("a.b", "", "keys", "train"):
        with pytest.raises(OptionError, match="a name is letters"):
            pk.wrap(net, "lora", targets="head", name=name)


def test_the_module_stays_itself(net: Transformer) -> None:
    head, weight, keys = net.head, net.head.weight, list(net.state_dict())
    pk.wrap(net, "lora", rank=2)
    assert net.head is head
    assert net.head.weight is weight
    assert isinstance(head, nn.Linear)
    assert [k for k in net.state_dict() if ".adapters." not in k] == keys
    trainable = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in net.named_parameters() if ".adapters." in n}
    assert "head.adapters.default.up" in trainable


@pytest.mark.parametrize("case", ADAPTERS)
def test_unwrap_leaves_no_trace(net: Transformer, case: str) -> None:
    net.norm.weight.requires_grad_(False)
    modules = list(net.named_modules())
    facts = [(type(m), dict(m.__dict__), list(m._modules)) for _, m in modules]
    flags = [p.requires_grad for p in net.parameters()]
    kind, options = ADAPTERS[case].kind, ADAPTERS[case].options
    targets = ["Attention"]
    if "tucker" in case:
        net.conv = nn.Conv2d(8, 8, 3)
        modules = list(net.named_modules())
        facts = [(type(m), dict(m.__dict__), list(m._modules)) for _, m in modules]
        flags = [p.requires_grad for p in net.parameters()]
        targets = ["conv"]
    pk.wrap(net, kind, targets=targets, **options)
    pk.wrap(net, "lora", targets="head", name="second")
    pk.set_strength(net, 0.5)
    pk.unwrap(net, "second")
    pk.unwrap(net)
    assert [(n, id(m)) for n, m in net.named_modules()] == [(n, id(m)) for n, m in modules]
    assert [(type(m), dict(m.__dict__), list(m._modules)) for _, m in modules] == facts
    assert [p.requires_grad for p in net.parameters()] == flags


def test_adapters_are_freed(net: Transformer) -> None:
    pk.wrap(net, "dora", rank=2)
    net(TOKENS).sum().backward()
    watched: list[Callable[[], object]] = [TensorWeakRef(p) for p in pk.adapter_parameters(net)]
    watched += [weakref.ref(host.adapter_state) for host in adapted_modules(net).values()]
    pk.unwrap(net)
    gc.collect()
    assert not any(ref() is not None for ref in watched)


def test_several_adapters_add_and_each_has_its_strength(net: Transformer) -> None:
    base = net.head(torch.ones(8))
    pk.wrap(net, "lora", targets="head", name="a")
    pk.wrap(net, "dora", targets="head", name="b", rank=2)
    train(net)
    ones = torch.ones(8)
    effects = {}
    for name in ("a", "b"):
        with pk.enabled(net, name):
            effects[name] = net.head(ones) - base
    pk.set_strength(net, 0.5, "a")
    pk.set_strength(net, -2, "b")
    torch.testing.assert_close(net.head(ones), base + 0.5 * effects["a"] - 2 * effects["b"])
    with pytest.raises(UnknownAdapterError, match="there is a, b"):
        pk.set_strength(net, 1, "c")
    for strength in (float("nan"), float("inf"), "1", None):
        with pytest.raises(OptionError, match="a finite number"):
            pk.set_strength(net, strength)  # type: ignore[arg-type]


def test_disabled_and_enabled_nest_and_survive_exceptions(net: Transformer) -> None:
    base = net(TOKENS)
    pk.wrap(net, "lora", name="a", rank=2)
    pk.wrap(net, "loha", name="b", rank=2)
    train(net)
    both = net(TOKENS)
    with pk.disabled(net):
        with pk.disabled(net), pk.disabled(net, "a"):
            assert torch.equal(net(TOKENS), base)
        assert torch.equal(net(TOKENS), base)
    assert torch.equal(net(TOKENS), both)
    with pk.disabled(net, "a"):
        only_b = net(TOKENS)
    with pytest.raises(IndexError), pk.disabled(net, "a"), pk.disabled(net, "b"):
        net(torch.tensor([[99]]))
    assert torch.equal(net(TOKENS), both)
    with pk.enabled(net, "b"):
        assert torch.equal(net(TOKENS), only_b)
    with pk.enabled(net):
        assert torch.equal(net(TOKENS), base)
    with pk.disabled(net):
        pk.unwrap(net, "a")
    assert torch.equal(net(TOKENS), only_b)


def test_verbs_on_a_bare_model_say_so(net: Transformer) -> None:
    for verb in (pk.unwrap, pk.adapter_parameters, pk.merge, lambda m: pk.set_strength(m, 1.0), pk.project_):
        with pytest.raises(UnknownAdapterError, match="no adapter on this model"):
            verb(net)
    with pytest.raises(MergeStateError, match="nothing is merged"):
        pk.restore(net)


def test_adapters_named_at_several_sites_need_a_name(net: Transformer) -> None:
    pk.wrap(net, "lora", targets="head", name="a")
    assert set(pk.adapter_state_dict(net)) == {"head.up", "head.down"}
    pk.wrap(net, "lora", targets="head", name="b")
    with pytest.raises(UnknownAdapterError, match="say which"):
        pk.adapter_state_dict(net)


class TestTied:
    @pytest.fixture
    def tied(self, net: Transformer) -> Transformer:
        net.head = nn.Linear(8, 5, bias=False)
        net.head.weight = net.embed.weight
        return net

    def test_needs_a_policy(self, tied: Transformer) -> None:
        with pytest.raises(TiedWeightsError, match=r"embed\.weight"):
            pk.wrap(tied, "lora", targets="head")
        with pytest.raises(OptionError, match="'skip', 'untie'"):
            pk.wrap(tied, "lora", tied="ignore")

    def test_skip(self, tied: Transformer) -> None:
        plan = pk.wrap(tied, "lora", tied="skip")
        assert "head" not in plan.modules
        assert ("head", "shares its weight with embed.weight") in plan.skipped

    def test_untie_gives_the_layer_its_own_copy_and_unwrap_ties_again(self, tied: Transformer) -> None:
        embedding = tied.embed.weight.detach().clone()
        pk.wrap(tied, "lora", targets="head", tied="untie")
        train(tied)
        wrapped = tied(TOKENS)
        pk.merge(tied)
        torch.testing.assert_close(tied(TOKENS), wrapped)
        assert torch.equal(tied.embed.weight, embedding)
        pk.restore(tied)
        pk.unwrap(tied)
        assert tied.head.weight is tied.embed.weight


def test_a_module_used_under_two_names_has_one_adapter() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared})
    assert pk.wrap(model, "lora", targets="second").modules == ("first",)
    assert len(list(adapted_modules(model))) == 1


class Standardised(nn.Conv2d):
    """A weight-standardised convolution: it computes with a function of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


@pytest.mark.parametrize("case", [name for name in ADAPTERS if "tucker" not in name and name != "glora"])
def test_a_layer_with_its_own_forward_is_adapted_where_its_weight_is_read(case: str) -> None:
    torch.manual_seed(0)
    layer, x = Standardised(8, 12, 3).double(), torch.randn(2, 8, 5, 5, dtype=torch.float64)
    before = layer(x)
    pk.wrap(layer, ADAPTERS[case].kind, **ADAPTERS[case].options)
    assert torch.equal(layer(x), before)
    train(layer)
    wrapped = layer(x)
    assert not torch.equal(wrapped, before)
    assert torch.equal(copy.deepcopy(layer)(x), wrapped)
    pk.merge(layer)
    torch.testing.assert_close(layer(x), wrapped, rtol=1e-12, atol=1e-12)
    pk.restore(layer)
    pk.unwrap(layer)
    assert torch.equal(layer(x), before)
    assert type(layer) is Standardised


@pytest.mark.parametrize("make", [
    lambda: nn.LazyLinear(4),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    lambda: nn.Linear(4, 4, dtype=torch.complex64),
    lambda: nn.Bilinear(4, 4, 4),
], ids=["lazy", "weight norm", "complex", "bilinear"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:Complex modules:UserWarning")
def test_what_has_no_plain_weight_is_refused(make: Any) -> None:
    model = nn.Sequential(make())
    with pytest.raises((UnsupportedLayerError, TargetError)) as caught:
        pk.wrap(model, "lora", targets="0")
    assert "0" in str(caught.value)


def test_dropouts_act_in_training_only() -> None:
    torch.manual_seed(0)
    for option in ("dropout", "rank_dropout", "module_dropout"):
        layer, x = nn.Linear(8, 8), torch.randn(4, 8)
        base = layer(x)
        pk.wrap(layer, "lora", rank=4, **{option: 0.5})
        train(layer)
        layer.eval()
        still = layer(x)
        layer.train()
        draws = torch.stack([layer(x) for _ in range(400)])
        assert draws.std(0).max() > 0
        if option == "module_dropout":  # off half the time, and unscaled
            torch.testing.assert_close(draws.mean(0), (base + still) / 2, rtol=0.2, atol=0.2)
        else:  # scaled, so the mean is the adapter itself
            torch.testing.assert_close(draws.mean(0), still, rtol=0.2, atol=0.2)


def test_a_refused_option_combination_leaves_the_model_alone(net: Transformer) -> None:
    for kwargs in ({"kind": None}, {"kind": "lora", "rules": [pk.Rule("head", "lora")]}, {"rules": []}):
        with pytest.raises(OptionError):
            pk.wrap(net, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'auto', 'factored' or 'dense'"):
        pk.wrap(net, "lora", route="fast")
    assert not adapted_modules(net)
