"""An adapter of some rows of a weight has the same ΔW row by row; the tensors named as factors of ΔW scale it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter, Stored
from peftkit.geometry import Shape
from tests.support.zoo import ADAPTERS, METHODS

EVERY = {**ADAPTERS, **METHODS}
#: what mixes rows and is therefore not taken apart
MIXED = {"loldu", "loldu rank 1", "dora of loldu", "dora in", "dora of lokr in", "boft", "boft rescaled"} | {
    name for name in ADAPTERS if name.startswith("oft") and name not in ("oft in", "oft series")
}
#: what is of other numbers for a weight of fewer rows
SIZED = (
    *("melora", "mora", "miss", "vera", "randlora", "lora-xs", "svdiff", "svft", "t-lora", "fourierft"),
    *("pissa", "milora", "olora", "vb-lora", "tiny-lora"),
)
MIXED |= {name for name in METHODS if name.startswith(SIZED)}
#: what no tensor scales alone
DISPROPORTIONATE = (
    (MIXED - METHODS.keys())
    | {"svdiff", "t-lora", "pissa", "milora", "olora", "vb-lora", "tiny-lora"}
    | {name for name, case in ADAPTERS.items() if case.kind in ("dora", "oft")}
    | {"dora of loha"}
)


def trained(case: str) -> tuple[Adapter, Tensor, Shape]:
    """An adapter of a weight (12, 8·K) whose parameters are not where they started."""
    torch.manual_seed(0)
    kernel = 3
    shape = Shape(12, 8, (kernel, kernel))
    weight = torch.randn(shape.rows, shape.columns, dtype=torch.float64)
    adapter = registry.build(EVERY[case].kind, shape, weight, **EVERY[case].options).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return adapter, weight, shape


def stored(adapter: Adapter) -> Stored:
    return Stored(adapter.kind, adapter.options, {k: t.detach() for k, t in adapter.state_dict().items()})


@pytest.mark.parametrize("case", EVERY)
def test_the_adapter_of_some_rows_has_these_rows_of_the_change(case: str) -> None:
    adapter, weight, shape = trained(case)
    rows = torch.tensor([7, 6, 0, 11])
    taken = type(adapter).of_rows(stored(adapter), shape, rows)
    assert (taken is None) == (case in MIXED)
    if taken is None:
        return
    part = weight[rows]
    own = registry.build(taken.kind, Shape(4, shape.channels, shape.kernel), part, **taken.options)
    own.load_state_dict(taken.tensors)
    expected, found = adapter.delta(weight).dense()[rows], own.eval().delta(part).dense()
    assert torch.linalg.vector_norm(found - expected) <= 1e-12 * torch.linalg.vector_norm(expected)


def test_the_adapter_of_some_rows_shares_no_memory_with_the_whole() -> None:
    adapter, _, shape = trained("lora")
    whole = stored(adapter)
    taken = type(adapter).of_rows(whole, shape, torch.arange(4))
    assert taken is not None
    assert {t.data_ptr() for t in taken.tensors.values()}.isdisjoint(t.data_ptr() for t in whole.tensors.values())


@pytest.mark.parametrize("case", EVERY)
def test_the_tensors_named_as_factors_scale_the_whole_change(case: str) -> None:
    adapter, weight, _ = trained(case)
    names = [name for name in type(adapter).scaling_parameters if name in adapter.state_dict()]
    assert bool(names) == (case not in DISPROPORTIONATE)
    before = adapter.delta(weight).dense().detach()
    with torch.no_grad():
        for name in names:
            adapter.state_dict()[name].mul_(-1.75)
    expected = -1.75 * before if names else before
    found = adapter.delta(weight).dense()
    assert torch.linalg.vector_norm(found - expected) <= 1e-12 * torch.linalg.vector_norm(expected)
