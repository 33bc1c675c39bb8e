"""Parameter groups: every trainable parameter once, at its rate, and decay only where it makes ΔW smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import DoRA, LoHa, LoLDU, LoRA
from peftkit.errors import LawError, OptionError, TargetError, UnknownAdapterError
from peftkit.testing.check import require_equal
from peftkit.testing.facts import facts_for, zero_factors
from peftkit.testing.laws import LAYERS, Cell, parts_of
from tests.support.zoo import ADAPTERS


class Net(nn.Module):
    """Layers of several names, with a norm, an embedding and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(8, 8), "mlp": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 3)


def net(kind: str = "lora", **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    pk.wrap(model, kind, targets=["blocks", "attention"], **options)
    for own in (model.head, model.blocks[1]["norm"], model.tokens):
        own.requires_grad_(True)
    return model


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Parameter name -> its learning rate and weight decay."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def cells(case: str) -> list[Cell]:
    """The case on every layer that takes it."""
    own, found = ADAPTERS[case], []
    for layer in LAYERS:
        cell = Cell(own.kind, own.options, layer)
        try:
            cell.wrapped()
        except OptionError:
            continue
        found.append(cell)
    return found


def hold(case: str, checked: list[Cell]) -> set[str]:
    """The laws that hold on all cells; LawError at the first that does not."""
    comparisons = [(cell, each) for cell in checked for law in facts_for(cell) for each in law(cell)]
    for cell, comparison in comparisons:
        require_equal(case, cell.layer, comparison)
    return {comparison.law for _, comparison in comparisons}


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_an_adapter_states_of_its_parameters_is_true(case: str) -> None:
    checked = cells(case)
    assert checked
    for cell in checked:
        adapter, W, _, _ = parts_of(cell.wrapped(moved=False)[0])
        present = {name for name, _ in adapter.named_parameters()}
        assert adapter.starts_at_zero & present == zero_factors(adapter, W)
    assert {"decay keeps ΔW = 0", "decay shrinks ΔW"} <= hold(case, checked) or ADAPTERS[case].kind == "ia3"


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("lora", {"up"}),
        ("loha", {"up2"}),
        ("loha tucker", {"down2"}),
        ("lokr", {"block"}),
        ("lokr rank", {"right"}),
        ("lokr tucker", {"outer"}),
        ("glora", {"base_down", "down"}),
        ("dora", {"inner.up"}),
        ("dora of loha", {"inner.up2"}),
        ("full", set()),
        ("ia3", set()),
        ("oft", set()),
        ("loldu", set()),
    ],
)
def test_the_factor_of_each_kind_that_starts_at_zero(case: str, names: set[str]) -> None:
    module = nn.Conv2d(8, 12, 3, dtype=torch.float64) if "tucker" in case else nn.Linear(8, 12, dtype=torch.float64)
    pk.wrap(module, ADAPTERS[case].kind, **ADAPTERS[case].options)
    adapter, _, _, _ = parts_of(module)
    assert adapter.starts_at_zero & {name for name, _ in adapter.named_parameters()} == names


def test_what_decay_must_not_touch() -> None:
    for kind, options, kept in (
        ("dora", {}, {"magnitude"}),
        ("ia3", {}, {"gate"}),
        ("loldu", {"rank": 2}, {"scale_shift"}),
        ("oft", {"rescale": True}, {"rescale"}),
        ("boft", {"rescale": True}, {"rescale"}),
    ):
        layer = nn.Sequential(nn.Linear(8, 8))
        pk.wrap(layer, kind, **options)
        groups = by_name(layer, pk.parameter_groups(layer, lr=1.0, weight_decay=0.1))
        undecayed = {name.rpartition(".")[2] for name, (_, decay) in groups.items() if decay == 0}
        assert undecayed == kept, kind


def planted(cls: type[Any], **attributes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        original = cls.__init__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.__dict__.update(attributes)

        patch.setattr(cls, "__init__", init)

    return plant


@pytest.mark.parametrize(
    ("case", "plant", "law"),
    [
        ("lora", planted(LoRA, starts_at_zero=frozenset({"down"})), "starts_at_zero"),
        ("lora", planted(LoRA, starts_at_zero=frozenset({"up", "down"})), "starts_at_zero"),
        ("loha tucker", planted(LoHa, starts_at_zero=frozenset({"up2"})), "starts_at_zero"),
        ("dora", planted(DoRA, decays=frozenset({"magnitude"})), "decay keeps ΔW = 0"),
        ("loldu", planted(LoLDU, scaling_parameters=frozenset({"shift"})), "scaling_parameters"),
    ],
)
def test_a_false_statement_is_found(
    case: str, plant: Callable[[pytest.MonkeyPatch], None], law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(LawError, match=law):
        hold(case, cells(case))


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = net(rank=2)
    groups = pk.parameter_groups(model, lr=1e-3, ratio=16.0, weight_decay=0.1)
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)
    rates = by_name(model, groups)
    assert rates["blocks.0.proj.adapters.default.up"] == (16e-3, 0.1)
    assert rates["blocks.0.proj.adapters.default.down"] == (1e-3, 0.1)
    assert rates["attention.adapters.default.q_proj.up"] == (16e-3, 0.1)
    assert rates["head.weight"] == rates["tokens.weight"] == (1e-3, 0.1)
    assert rates["head.bias"] == rates["blocks.1.norm.weight"] == (1e-3, 0.0)
    assert not [name for name in rates if name.endswith("proj.weight")]


def test_a_shared_parameter_is_there_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False))
    pk.wrap(model, "lora", targets="0", rank=2)
    model[2].weight = model[1].weight
    model[1].requires_grad_(True)
    model.register_module("again", model[0])
    groups = pk.parameter_groups(model, lr=1.0)
    assert sum(len(group["params"]) for group in groups) == 3
    torch.optim.AdamW(groups)


def test_a_step_is_that_of_the_rates() -> None:
    def stepped(groups: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        pk.wrap(model, "lora", rank=2)
        x = torch.randn(4, 8)
        optimizer = torch.optim.AdamW(groups(model), lr=123.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def by_hand(model: nn.Module) -> Any:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return [
            {"params": [p], "lr": 8e-3 if name.endswith("up") else 1e-3, "weight_decay": 0.1}
            for name, p in named.items()
        ]

    got, expected = stepped(lambda m: pk.parameter_groups(m, lr=1e-3, ratio=8, weight_decay=0.1)), stepped(by_hand)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("pattern", "hit", "missed"),
    [
        ("blocks.1", {"blocks.1.proj", "blocks.1.mlp", "blocks.1.norm"}, {"blocks.0.proj", "head"}),
        ("blocks.1.norm", {"blocks.1.norm"}, {"blocks.1.proj"}),
        ("*.proj", {"blocks.0.proj", "blocks.1.proj"}, {"blocks.0.mlp"}),
        ("re:blocks\\.0\\..*", {"blocks.0.proj", "blocks.0.mlp"}, {"blocks.1.proj"}),
        ("mlp", {"blocks.0.mlp", "blocks.1.mlp"}, {"blocks.0.proj"}),
        ("LayerNorm", {"blocks.1.norm"}, {"blocks.1.proj"}),
        ("Embedding", {"tokens"}, {"head"}),
        ("attention", {"attention.q_proj", "attention.v_proj"}, {"blocks.0.proj"}),
        ("attention.q_proj", {"attention.q_proj"}, {"attention.k_proj"}),
        ("*.q_proj", {"attention.q_proj"}, {"attention.k_proj"}),
        ("attn-only", {"attention.q_proj", "attention.k_proj"}, {"blocks.0.proj"}),
        ("full", {"attention.q_proj", "head", "tokens"}, set()),
    ],
)
def test_rules_select_as_targets_do(pattern: str, hit: set[str], missed: set[str]) -> None:
    model = net(rank=2)
    rates = by_name(model, pk.parameter_groups(model, lr=1.0, rules={pattern: 2.0}))
    at_two = {_owner(name) for name, (rate, _) in rates.items() if rate == 2.0}
    at_one = {_owner(name) for name, (rate, _) in rates.items() if rate == 1.0}
    assert hit <= at_two
    assert missed <= at_one
    assert not at_one & at_two


def _owner(name: str) -> str:
    before, found, after = name.partition(".adapters.default")
    if not found:
        return name.rpartition(".")[0]
    slot = after.strip(".").rpartition(".")[0]
    return f"{before}.{slot}" if slot else before


def test_the_first_rule_that_matches_counts() -> None:
    model = net(rank=2)
    rules = [("blocks.0", 3.0), ("*.proj", 2.0), ("Linear", 4.0)]
    rates = by_name(model, pk.parameter_groups(model, lr=1.0, ratio=10, rules=rules))
    assert rates["blocks.0.proj.adapters.default.up"][0] == 30.0
    assert rates["blocks.1.proj.adapters.default.down"][0] == 2.0
    assert rates["blocks.1.mlp.adapters.default.down"][0] == 4.0
    assert rates["head.bias"][0] == 4.0
    assert rates["tokens.weight"][0] == 1.0


def test_one_adapter_of_several() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b"):
        pk.wrap(model, "lora", rank=2, name=name)
    (group,) = pk.parameter_groups(model, lr=1.0, name="b")
    assert [id(p) for p in group["params"]] == [id(p) for p in pk.adapter_parameters(model, "b")]
    with pytest.raises(UnknownAdapterError):
        pk.parameter_groups(model, lr=1.0, name="c")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Rprop])
def test_any_optimiser_takes_them(optimizer: Any) -> None:
    model = net(rank=2)
    own = optimizer(pk.parameter_groups(model, lr=1e-3, ratio=4, weight_decay=0.0))
    assert sorted({group["lr"] for group in own.param_groups}) == [1e-3, 4e-3]


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"lr": -1.0}, OptionError, "lr=-1.0"),
        ({"lr": float("nan")}, OptionError, "lr=nan"),
        ({"lr": "1e-3"}, OptionError, "lr='1e-3'"),
        ({"lr": True}, OptionError, "lr=True"),
        ({"ratio": 0}, OptionError, "ratio=0"),
        ({"ratio": float("inf")}, OptionError, "ratio=inf"),
        ({"weight_decay": -0.1}, OptionError, "weight_decay=-0.1"),
        ({"rules": {"blocks": -1}}, OptionError, "blocks"),
        ({"rules": ["blocks"]}, OptionError, "pairs"),
        ({"rules": {"": 1.0}}, TargetError, "strings"),
        ({"rules": {"blcks": 1.0}}, TargetError, "no module with trainable parameters. Did you mean"),
        ({"rules": {"blocks.0.norm": 1.0}}, TargetError, "no module with trainable"),
        ({"rules": {"re:(": 1.0}}, TargetError, "regular expression"),
        ({"rules": {"blocks": 1.0, "*.proj": 2.0, "blocks.0": 3.0}}, TargetError, "earlier rules"),
    ],
)
def test_what_is_no_input_is_refused(options: dict[str, Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error) as raised:
        pk.parameter_groups(net(rank=2), **{"lr": 1.0, **options})
    assert what in str(raised.value)


def test_a_ratio_without_a_factor_is_refused() -> None:
    with pytest.raises(OptionError, match="ratio=16"):
        pk.parameter_groups(net("ia3"), lr=1.0, ratio=16)


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(UnknownAdapterError, match="no adapter"):
        pk.parameter_groups(Net(), lr=1.0)
    model = net(rank=2)
    model.requires_grad_(False)
    with pytest.raises(OptionError, match="requires gradients"):
        pk.parameter_groups(model, lr=1.0)
