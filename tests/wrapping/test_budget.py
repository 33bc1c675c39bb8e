"""Budgets: what is spent is near to what may be, on the ranks that are worth most."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.training import spread
from peftkit.wrapping.budget import bytes_of
from peftkit.wrapping.price import Price

falling = st.lists(st.floats(0, 100), min_size=0, max_size=4).map(lambda own: sorted(own, reverse=True))
weights = st.lists(st.tuples(falling, st.integers(1, 7)), min_size=1, max_size=4)


def tables(drawn: Sequence[tuple[list[float], int]]) -> tuple[dict[str, list[float]], dict[str, int]]:
    return {f"w{i}": own for i, (own, _) in enumerate(drawn)}, {f"w{i}": cost for i, (_, cost) in enumerate(drawn)}


@given(weights, st.integers(0, 60))
def test_a_budget_is_kept_and_nothing_more_fits(drawn: list[tuple[list[float], int]], budget: int) -> None:
    scores, cost = tables(drawn)
    ranks = spread(scores, cost, budget)
    left = budget - sum(cost[name] * rank for name, rank in ranks.items())
    assert ranks.keys() == scores.keys() and left >= 0
    further = {name: scores[name][rank:] for name, rank in ranks.items()}
    assert all(cost[name] > left for name, rest in further.items() if rest and rest[0] > 0)
    assert spread(scores, cost, budget) == ranks


@given(weights, st.integers(0, 60))
def test_of_ranks_of_one_cost_the_best_are_taken(drawn: list[tuple[list[float], int]], budget: int) -> None:
    scores, _ = tables(drawn)
    ranks = spread(scores, dict.fromkeys(scores, 1), budget)
    taken = sum(sum(scores[name][:rank]) for name, rank in ranks.items())
    best = sorted(itertools.chain(*scores.values()), reverse=True)[:budget]
    assert taken == pytest.approx(sum(best))


def test_every_weight_may_get_some_first() -> None:
    assert spread({"a": [9, 8, 7], "b": [1, 1], "c": []}, {"a": 1, "b": 2, "c": 5}, 5, least=1) == {
        "a": 3,
        "b": 1,
        "c": 0,
    }
    with pytest.raises(OptionError, match="budget=2 was given, and 1 ranks for each weight cost 3"):
        spread({"a": [1.0], "b": [1.0]}, {"a": 1, "b": 2}, 2, least=1)


@pytest.mark.parametrize(
    "scores, cost, message",
    [
        ({"a": [1.0]}, {}, "a: cost has nothing for it"),
        ({"a": [1.0]}, {"a": 0}, "a: cost=0 was given"),
        ({"a": [1.0, 2.0]}, {"a": [1]}, "a number above 0 for each rank"),
        ({"a": [float("nan")]}, {"a": 1}, "a: scores=.nan. were given, and one is not finite"),
    ],
)
def test_what_is_no_score_or_cost_is_named(scores: Any, cost: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        spread(scores, cost, 5)


def test_sizes() -> None:
    assert [bytes_of(own) for own in (7, "7", "5MB", "1.5 kB", "2 MiB", "1gb")] == [7, 7, 5 * 10**6, 1500, 2**21, 10**9]
    for wrong in ("", "MB", "-1", 0, "5 parsecs", True, "nan"):
        with pytest.raises(OptionError, match="a number of bytes or a size as '5MB'"):
            bytes_of(wrong)


def test_a_rank_that_takes_as_much_as_the_matrix_becomes_the_matrix() -> None:
    some = Price((1, 2, 3, 4), (10, 20, 30, 40), 25)
    assert some.steps() == [10, 10, 5] and [some.rank(step) for step in range(4)] == [0, 1, 2, None]
    assert Price((1,), (10,), 10).steps() == [10] and Price((1,), (10,), 10).rank(1) is None
    assert Price((1, 2), (10, 20), 99).steps() == [10, 10] and Price((1, 2), (10, 20), 99).rank(2) == 2
    assert Price((2, 4), (10, 30), 99).steps() == [10, 20] and Price((2, 4), (10, 30), 99).rank(2) == 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=2), nn.Flatten(), nn.Linear(32, 64), nn.Linear(64, 4)
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "svdlora", "loha", "melora"])
@pytest.mark.parametrize("scored", [False, True])
def test_a_plan_spends_its_budget(kind: str, scored: bool) -> None:
    model = network()
    names = pk.plan(model, "lora").modules
    scores = {name: [2.0**-i * (1 + place) for i in range(40)] for place, name in enumerate(names)} if scored else None
    options: dict[str, Any] = {"blocks": 1} if kind == "melora" else {}
    plan = pk.plan(model, kind, budget="6KB", scores=scores, **options)
    assert 0.9 * 6000 < plan.bytes <= 6000 and plan.budget == 6000 and f"{plan.bytes:,} of 6,000 bytes" in str(plan)
    assert plan.why.keys() == set(names)
    again = pk.plan(model, kind, budget=6000, scores=scores, **options)
    assert [(e.site.name, e.options) for e in again.entries] == [(e.site.name, e.options) for e in plan.entries]
    done = pk.wrap(model, rules=plan.rules)
    assert done.bytes == plan.bytes == sum(p.nbytes for p in pk.adapter_parameters(model))
    assert {e.site.name: (e.kind, e.options) for e in done.entries} == {
        e.site.name: (e.kind, e.options) for e in plan.entries
    }


def test_without_scores_ranks_are_equal_and_small_matrices_are_whole() -> None:
    plan = pk.plan(network(), "lora", budget="12KB")
    ranks = [entry.options["rank"] for entry in plan.entries if entry.kind == "lora"]
    assert max(ranks) - min(ranks) <= 1 and [e.site.name for e in plan.entries if e.kind == "full"] == ["0", "4"]
    everything = pk.plan(network(), "lora", budget="1GB")
    assert all(entry.kind == "full" for entry in everything.entries)


def test_scores_decide_and_say_why() -> None:
    model = network()
    scores = {"0": [0.0] * 4, "1": [0.0] * 4, "3": [8.0, 4.0, 2.0, 1.0], "4": [1e-3] * 4}
    plan = pk.plan(model, "lora", budget=900, scores=scores)
    assert {entry.site.name: entry.options["rank"] for entry in plan.entries} == {"3": 2}
    assert plan.why["3"].startswith("79.") and "its next rank would be 0.50 of the last one taken" in plan.why["3"]
    assert plan.why["0"] == "nothing; no further rank is worth anything"
    assert pk.plan(model, "lora", budget="1KB", scores={key: [0.0] for key in scores}).entries == ()
    assert ("0", "the budget gives it no rank") in plan.skipped
    narrow = pk.plan(model, "lora", budget=900, scores=scores, dtype=torch.float16)
    assert {entry.site.name: entry.options["rank"] for entry in narrow.entries}["3"] == 4


def test_a_shared_adapter_is_paid_for_once() -> None:
    tied = nn.ModuleDict({"e": nn.Embedding(90, 6), "h": nn.Linear(6, 90, bias=False)})
    tied["h"].weight = tied["e"].weight  # type: ignore[union-attr]
    plan = pk.plan(tied, "lora", targets=["e", "h"], tied="share", budget=96 * 4 * 2)
    assert [entry.options["rank"] for entry in plan.entries] == [2, 2] and plan.bytes == 96 * 4 * 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": "1KB", "rank": 4}, "lora takes none: Rule.* gives one"),
        ({"budget": 8}, "the cheapest adapter takes"),
        ({"scores": {}}, "scores were given, and no budget"),
        ({"budget": "1KB", "scores": {"0": [1.0]}}, "1: scores has nothing for it"),
    ],
)
def test_what_no_budget_divides(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pk.plan(network(), "lora", **options)
    with pytest.raises(OptionError, match="ia3 takes none: it has none"):
        pk.plan(network(), "ia3", budget="1KB")


def test_a_model_of_real_size_is_within_one_in_a_hundred_and_the_same_each_time() -> None:
    layer = nn.TransformerEncoderLayer(768, 12, 3072, device="meta")
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(12)))
    generator = torch.Generator().manual_seed(0)
    size = {name: float(torch.rand((), generator=generator)) for name in pk.plan(model, "lora").modules}
    scores = {name: [own * 0.8**i for i in range(16)] for name, own in size.items()}
    for budget in (10**6, 5 * 10**6):
        plans = [pk.plan(model, "lora", budget=budget, scores=scores, dtype=torch.float16) for _ in range(2)]
        assert 0.99 * budget <= plans[0].bytes <= budget
        ranks, again = ([(e.site.name, e.options) for e in plan.entries] for plan in plans)
        assert ranks == again and plans[0].why == plans[1].why


@pytest.mark.parametrize(
    "kind, options",
    [
        ("lora-xs", {}),
        ("mos", {}),
        ("mora", {}),
        ("lokr", {}),
        ("lora", {"tucker": True}),
        ("dylora", {"block": 3}),
        ("anchored", {"start": "given"}),
        ("lora", {"decompose": True}),
    ],
)
def test_bytes_that_are_no_multiple_of_the_rank_stay_within_the_budget(kind: str, options: dict[str, Any]) -> None:
    """As r² of lora-xs and of Tucker cores, √r of mora, and ranks that are multiples of a block."""
    targets = "0" if "tucker" in options else ["1", "3"]
    for budget in (1000, 9000):
        model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 40))
        plan = pk.plan(model, kind, targets=targets, budget=budget, scores={n: [1.0] * 60 for n in "013"}, **options)
        assert 0 < plan.bytes <= budget
        assert pk.wrap(model, rules=plan.rules).bytes == plan.bytes
        ranks = [entry.options["rank"] for entry in plan.entries if entry.kind == kind]
        assert all(rank % options.get("block", 1) == 0 for rank in ranks)


def test_a_rank_that_saves_bytes_is_no_matter_of_a_budget() -> None:
    with pytest.raises(OptionError, match="randlora takes fewer bytes the larger its rank"):
        pk.plan(nn.Linear(16, 16), "randlora", budget="1KB")


@pytest.mark.parametrize(
    "scores",
    [3.0, None, "12", ["a"], torch.ones(1, 2), torch.tensor(2.0), torch.ones(2, device="meta"), [1e308, 1e309]],
)
def test_scores_that_are_no_numbers_are_named(scores: Any) -> None:
    for attempt in (
        lambda: pk.plan(network(), "lora", targets="3", budget="1KB", scores={"3": scores}),
        lambda: spread({"3": scores}, {"3": 1}, 3),
    ):
        with pytest.raises(OptionError, match="3: scores="):
            attempt()
    with pytest.raises(OptionError, match="3: scores has nothing for it"):
        pk.plan(network(), "lora", targets="3", budget="1KB", scores=[scores])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="3: costs="):
        spread({"3": [1.0]}, {"3": torch.tensor(1.0)}, 3)  # type: ignore[dict-item]


class Reads(nn.Module):
    """A model whose head is read, with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 9)


@pytest.mark.parametrize(
    "rules",
    [
        [pk.Rule("head", "lora", read=True, rank=2), pk.Rule("body", "lora", rank=2)],
        [pk.Rule(["norm", "body"], "full")],
        [pk.Rule("norm", "full", exclude="norm.bias"), pk.Rule("body", "lora", rank=1)],
        [pk.Rule("norm.bias", "full"), pk.Rule("body.bias", "full")],
    ],
)
def test_the_rules_of_a_plan_are_the_plan(rules: list[pk.Rule]) -> None:
    """Read weights stay read; a norm's weight comes without its bias, if that was so."""
    plan, again = pk.plan(Reads(), rules=rules), pk.plan(Reads(), rules=pk.plan(Reads(), rules=rules).rules)
    own, other = ({e.site.name: (e.kind, e.options, e.read, e.route) for e in p.entries} for p in (plan, again))
    assert own == other and plan.bytes == again.bytes


@pytest.mark.parametrize("model", [nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(9, 8), nn.MultiheadAttention(8, 2)])
def test_rules_of_a_model_that_is_one_layer(model: nn.Module) -> None:
    name = type(model).__name__
    plan = pk.plan(model, "full", targets="full" if name == "MultiheadAttention" else name)
    assert {e.site.name for e in pk.plan(model, rules=plan.rules).entries} == {e.site.name for e in plan.entries}


def test_rules_of_names_that_are_patterns() -> None:
    names = (
        "a+b",
        "a*",
        "a[0]",
        "(x)",
        "re:x",
        "full",
        "attn-only",
        "Linear",
        "a|b",
        "^a$",
        "a\\b",
        "a b",
        "{2}",
        "a\nb",
    )
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    plan = pk.plan(model, "lora", targets="*", budget="2KB")
    assert pk.wrap(model, rules=plan.rules).modules == plan.modules == names
