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
from peftkit.wrapping.budget import Price, bytes_of

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
        ({"a": [float("nan")]}, {"a": 1}, "a: a score is not finite"),
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
    price = Price(first=10, more=10, most=4, full=25)
    assert price.steps() == [10, 10, 5] and price.is_full(3) and not price.is_full(2)
    assert Price(10, 10, 4, 10).steps() == [10] and Price(10, 10, 4, 10).is_full(1)
    assert Price(10, 10, 2, 99).steps() == [10, 10] and not Price(10, 10, 2, 99).is_full(2)


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
    options = {"blocks": 1} if kind == "melora" else {}
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
        ({"budget": 8}, "the cheapest adapter of one rank takes"),
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
