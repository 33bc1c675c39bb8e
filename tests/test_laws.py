"""Every law over every adapter × every layer, and over shapes and options that hypothesis draws."""

from __future__ import annotations

import pytest
import torch

import peftkit as pk
from tests import laws
from tests.zoo import ADAPTERS, LAYERS

CELLS = [(adapter, layer) for adapter in ADAPTERS for layer in LAYERS]
REFUSED = {cell: reason for cell in CELLS if (reason := laws.refusal(*cell)) is not None}
ALLOWED = [cell for cell in CELLS if cell not in REFUSED]
ids = ["-".join(cell).replace(" ", "_") for cell in ALLOWED]
every_cell = pytest.mark.parametrize("adapter, layer", ALLOWED, ids=ids)


def test_every_registered_kind_is_in_the_zoo() -> None:
    assert {pk.registry.get(case.kind).kind for case in ADAPTERS.values()} >= set(pk.kinds())


@every_cell
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda name: name.replace(" ", "_"))
def test_law(law: str, adapter: str, layer: str) -> None:
    laws.LAWS[law](adapter, layer)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_law_in_other_dtypes(adapter: str, layer: str, dtype: torch.dtype) -> None:
    laws.identity_at_start(adapter, layer, dtype)
    laws.routes_agree(adapter, layer, dtype)
    laws.forward_is_merged(adapter, layer, dtype)
    if dtype != torch.float32:
        laws.restore_is_exact(adapter, layer, dtype)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("layer", ["linear", "conv2d k3"])
def test_a_hundred_cycles(adapter: str, layer: str) -> None:
    if (adapter, layer) in REFUSED:
        assert REFUSED[adapter, layer]
        return
    laws.restore_is_exact(adapter, layer, torch.bfloat16, cycles=100)


@pytest.mark.parametrize("cell", REFUSED, ids="-".join)
def test_a_refusal_says_what_to_do(cell: tuple[str, str]) -> None:
    kind = ADAPTERS[cell[0]].kind
    reason = REFUSED[cell]
    assert pk.registry.get(kind).kind in reason
    assert "expected" in reason or "use" in reason
