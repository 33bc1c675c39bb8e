"""Every law over every adapter × every layer, and over shapes and options that hypothesis draws."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import registry
from peftkit.adapters.loldu import INITS
from peftkit.errors import MergeError
from tests.support import laws
from tests.support.zoo import (
    ADAPTERS,
    CASES,
    FEW,
    LAYERS,
    LOOKUPS,
    METHODS,
    READ,
    STACKS,
    STRUCTURES,
    TYPICAL,
    make,
    train,
)

CELLS = [(adapter, layer) for adapter in ADAPTERS for layer in (*LAYERS, *READ, *STACKS, "embedding")]
CELLS += [("full rows", layer) for layer in ("linear", "conv2d k3", "transposed2d g2", *LOOKUPS)]
CELLS += [(adapter, layer) for adapter in FEW for layer in LOOKUPS if layer != "embedding"]
CELLS += [(adapter, layer) for adapter in METHODS for layer in (*LAYERS, *READ, *STACKS, "embedding")]


def of(cells: list[tuple[str, str]], few: Collection[str] = METHODS) -> pytest.MarkDecorator:
    """Parametrise a test over cells. few: cases of which the typical layers alone are in every run."""
    slow = [pytest.mark.slow]
    marks = {cell: slow if cell[0] in few and cell[1] not in TYPICAL else [] for cell in cells}
    params = [pytest.param(*cell, id="-".join(cell).replace(" ", "_"), marks=marks[cell]) for cell in cells]
    return pytest.mark.parametrize("adapter, layer", params)


every_cell = of(CELLS)


def refused(adapter: str, layer: str) -> bool:
    """Whether a cell has no meaning; what it raises must say so, and what to do."""
    reason = laws.refusal(adapter, layer)
    if reason is None:
        return False
    assert registry.get(CASES[adapter].kind).kind in reason
    assert "expected" in reason or "use" in reason
    return True


def test_every_registered_kind_is_in_the_zoo() -> None:
    assert {registry.get(case.kind).kind for case in CASES.values()} >= set(pk.kinds())


@every_cell
def test_laws(adapter: str, layer: str, subtests: pytest.Subtests) -> None:
    """One test a cell, as a cell's laws share its making."""
    if refused(adapter, layer):
        return
    for name, law in laws.LAWS.items():
        with subtests.test(law=name):
            torch.manual_seed(0)
            law(adapter, layer)


def _runs(layer: nn.Module, x: Tensor) -> bool:
    """Not so for padding of half precision on the CPU in old releases of torch."""
    try:
        layer(x)
    except RuntimeError:
        return False
    return True


narrowed = of([cell for cell in CELLS if cell[1] != "experts"], few=CASES)


@narrowed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_laws_in_other_dtypes(adapter: str, layer: str, dtype: torch.dtype) -> None:
    """The laws that a narrower dtype could break."""
    if refused(adapter, layer):
        return
    if not _runs(*make(layer, dtype)):
        pytest.skip(f"this torch does not run the plain layer in {dtype}")
    laws.identity_at_start(adapter, layer, dtype)
    laws.routes_agree(adapter, layer, dtype)
    laws.forward_is_merged(adapter, layer, dtype)
    if dtype != torch.float32:
        laws.restore_is_exact(adapter, layer, dtype)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("layer", ["linear", "conv2d k3"])
def test_a_hundred_cycles(adapter: str, layer: str) -> None:
    if not refused(adapter, layer):
        laws.restore_is_exact(adapter, layer, torch.bfloat16, cycles=100)


@st.composite
def cells(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...], str, dict[str, Any]]:
    """A layer of any size, stride, dilation, grouping and padding, its input's shape, and an adapter with options."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, rows = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 6))
    bias = draw(st.booleans())
    spatial = draw(st.integers(0, 3))
    if spatial == 0:
        layer: nn.Module = nn.Linear(channels, rows, bias)
        size: tuple[int, ...] = (draw(st.integers(1, 3)), channels)
    else:
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(spatial))
        options: dict[str, Any] = {
            "stride": draw(st.integers(1, 2)),
            "dilation": draw(st.integers(1, 2)),
            "groups": groups,
            "bias": bias,
        }
        if draw(st.booleans()):
            layer = getattr(nn, f"ConvTranspose{spatial}d")(channels, rows, kernel, **options)
        else:
            mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
            padding = tuple(draw(st.integers(0, 1)) for _ in range(spatial))
            layer = getattr(nn, f"Conv{spatial}d")(
                channels, rows, kernel, padding=padding, padding_mode=mode, **options
            )
        size = (draw(st.integers(1, 2)), channels, *(draw(st.integers(5, 6)) for _ in range(spatial)))
    kind = draw(st.sampled_from(STRUCTURES))
    rank = draw(st.integers(1, 3))
    alpha = draw(st.sampled_from([None, 0.5, 7.0]))
    drawn: dict[str, dict[str, Any]] = {
        "lora": {"rank": rank, "alpha": alpha, "rslora": bias, "tucker": draw(st.booleans())},
        "loha": {"rank": rank, "alpha": alpha, "tucker": draw(st.booleans())},
        "lokr": {"rank": draw(st.sampled_from([None, 1])), "factor": draw(st.sampled_from([-1, 2, (2, 3)]))},
        "loldu": {"rank": rank, "alpha": alpha, "init": draw(st.sampled_from(INITS))},
        "dora": {
            "inner": draw(st.sampled_from(["lora", "loha"])),
            "rank": rank,
            "axis": draw(st.sampled_from(["out", "in"])),
        },
        "full": {},
        "boft": {"block_size": draw(st.sampled_from([2, 4, 6])), "rescale": bias},
        "ia3": {"side": draw(st.sampled_from(["out", "in"]))},
        "glora": {"rank": rank, "alpha": alpha},
        "oft": {"block_size": draw(st.integers(2, 5)), "side": draw(st.sampled_from(["out", "in"])), "rescale": bias},
    }
    return layer.double(), size, kind, drawn[kind]


Cell = tuple[nn.Module, tuple[int, ...], str, dict[str, Any]]


def trained_cell(cell: Cell, seed: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, bytes] | None:
    """The wrapped and trained layer, an input and the bits of its weight; None for a typed refusal.

    Checks that wrapping changed nothing.
    """
    layer, size, kind, options = cell
    layer.to(dtype)
    torch.manual_seed(seed)
    x = torch.randn(size).to(dtype).requires_grad_()
    before, weight = layer(x), laws.bits(layer.weight)
    try:
        pk.wrap(layer, kind, **options)
    except laws.REFUSALS:
        return None
    assert torch.equal(layer(x), before)
    train(layer, seed, size=0.1)
    return layer, x, weight


def hold(cell: Cell, seed: int) -> None:
    """Identity, routes with gradients, forward = merged, restore, and the algebra, or a typed refusal."""
    made = trained_cell(cell, seed, torch.float64)
    if made is None:
        return
    layer, x, weight = made
    results = []
    for route in ("factored", "dense"):
        layer.adapter_state.route = route
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *pk.adapter_parameters(layer)])])
    parts = laws.terms(layer, x)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, *(float(p.norm()) for p in parts)))
    pk.set_strength(layer, -0.7)
    y = layer(x)
    pk.merge(layer)
    laws.agree(layer(x), y, torch.float64, "merged", *parts)
    pk.restore(layer)
    assert laws.bits(layer.weight) == weight
    delta, W = laws.the_delta(layer)
    dense = delta.dense()
    laws.agree(delta.inner(W), (dense * W).sum(), torch.float64, "inner", dense.norm() * W.norm())
    laws.agree(delta.sqnorm(), dense.square().sum(), torch.float64, "sqnorm", W.norm().square())


def hold_narrow(cell: Cell, seed: int, dtype: torch.dtype) -> None:
    """Identity, forward = merged at a strength, and restore, to the bounds of the dtype."""
    made = trained_cell(cell, seed, dtype)
    if made is None:
        return
    layer, x, weight = made
    parts = laws.terms(layer, x)
    for strength in (1.0, -0.7):
        pk.set_strength(layer, strength)
        y = layer(x)
        try:
            pk.merge(layer, backup="packed")
        except MergeError:  # a ΔW too small for the dtype: nothing was written
            assert laws.bits(layer.weight) == weight
            continue
        laws.agree(layer(x), y, dtype, f"merged at {strength}", *parts)
        pk.restore(layer)
        assert laws.bits(layer.weight) == weight


relaxed = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@given(cells(), st.integers(0, 2**16))
@settings(max_examples=150, **relaxed)
def test_laws_of_drawn_cells(cell: Cell, seed: int) -> None:
    hold(cell, seed)


@given(cells(), st.integers(0, 2**16), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=150, **relaxed)
def test_laws_of_drawn_cells_in_other_dtypes(cell: Cell, seed: int, dtype: torch.dtype) -> None:
    assume(_runs(copy.deepcopy(cell[0]).to(dtype), torch.zeros(cell[1], dtype=dtype)))
    hold_narrow(cell, seed, dtype)


@pytest.mark.slow
@given(cells(), st.integers(0, 2**16), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=1500, **relaxed)
def test_laws_of_many_drawn_cells(cell: Cell, seed: int, dtype: torch.dtype) -> None:
    hold(copy.deepcopy(cell), seed)
    hold_narrow(cell, seed, dtype)


@pytest.mark.slow
@every_cell
def test_a_hundred_cycles_of_every_cell(adapter: str, layer: str) -> None:
    if refused(adapter, layer):
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        laws.restore_is_exact(adapter, layer, dtype, cycles=100)
