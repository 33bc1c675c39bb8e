"""What is said of every kind: facts that tables and the command read, and counts that are those of a plan."""

from __future__ import annotations

import re

import pytest
from torch import nn

import peftkit as pk
from peftkit.adapters import registry
from peftkit.adapters.facts import FAMILIES
from peftkit.errors import OptionError, UnknownAdapterError
from tests.support.zoo import OPTIONS

KINDS = [kind for kind in pk.kinds() if registry.get(kind).__module__.startswith("peftkit.")]


@pytest.mark.parametrize("kind", KINDS)
def test_facts_and_counts(kind: str) -> None:
    found = pk.describe(kind, 16, 8, **OPTIONS[kind])
    assert found.facts.family in FAMILIES
    assert found.facts.formula and found.facts.when and not found.facts.when.endswith(".")
    assert found.paper == registry.get(kind).paper
    assert found.parameters == pk.plan(nn.Linear(8, 16, device="meta"), kind, **OPTIONS[kind]).parameters
    assert found.options.items() >= OPTIONS[kind].items()
    assert registry.get(kind).facts is found.facts


def test_aliases_and_refusals() -> None:
    assert pk.describe("locon") == pk.describe("lora")
    assert pk.describe("lora").aliases == ("locon",)
    with pytest.raises(UnknownAdapterError, match="lorra"):
        pk.describe("lorra")
    with pytest.raises(OptionError, match="boft: block_size=4"):
        pk.describe("boft", 7, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_peers_are_theirs(kind: str) -> None:
    peft, lycoris = pytest.importorskip("peft"), pytest.importorskip("lycoris.wrapper")
    facts = registry.get(kind).facts
    called = re.match(r"\w*", facts.peft)
    assert called is not None
    assert not facts.peft or issubclass(getattr(peft, called[0]), peft.PeftConfig)
    assert set(re.findall(r"[\w-]+", facts.lycoris)) <= {*lycoris.network_module_dict, "with", "weight_decompose"}


def test_a_kind_of_a_user_needs_no_facts() -> None:
    assert not any(vars(pk.Adapter.facts).values())
