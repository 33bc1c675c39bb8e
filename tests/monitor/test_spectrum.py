"""Ranks and intruder dimensions against full singular value decompositions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.monitor import CSMonitor, Record, spectra
from peftkit.wrapping.installed import installed_adapters
from tests.support.laws import refusal
from tests.support.zoo import ADAPTERS, make, train


def ranks(D: Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(D.double())
    share = values / values.sum()
    entropy = -sum(p * math.log(p) for p in share.tolist() if p > 1e-14)
    return math.exp(entropy), float(values.square().sum() / values[0] ** 2)


def change(model: nn.Module, names: dict[str, float]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for where in installed_adapters(model, list(names)):
        D = names[where.name] * where.adapter.delta(where.base).dense().detach().double()
        sums[where.site] = sums[where.site] + D if where.site in sums else D
    return sums


@pytest.mark.parametrize("layer", ["linear", "conv2d k3", "conv2d k1", "transposed2d", "conv2d depthwise"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_ranks_of_every_adapter(adapter: str, layer: str) -> None:
    if refusal(adapter, layer) is not None:
        with pytest.raises((OptionError, TypeError)):
            pk.wrap(make(layer)[0], ADAPTERS[adapter].kind, **ADAPTERS[adapter].options)
        return
    module, _ = make(layer)
    pk.wrap(module, ADAPTERS[adapter].kind, **ADAPTERS[adapter].options)
    assert spectra(module)[""].effective_rank == 0
    train(module)
    found = spectra(module)[""]
    (D,) = change(module, {"default": 1.0}).values()
    assert (found.effective_rank, found.stable_rank) == pytest.approx(ranks(D), rel=1e-5)


def test_ranks_of_several_adapters_are_of_their_sum() -> None:
    for kinds in (["lora", "loha"], ["lora", "oft"], ["lokr", "boft"]):
        model = nn.Linear(24, 24).double()
        for i, kind in enumerate(kinds):
            options: dict[str, Any] = {"lora": {"rank": 2}, "loha": {"rank": 2}, "boft": {"block_size": 6}}
            pk.wrap(model, kind, name=kind, **options.get(kind, {}))
            train(model, seed=i, name=kind)
            pk.set_strength(model, 0.7 - i, kind)
        found = spectra(model)[""]
        (D,) = change(model, {kind: 0.7 - i for i, kind in enumerate(kinds)}).values()
        assert (found.effective_rank, found.stable_rank) == pytest.approx(ranks(D), rel=1e-5)


def layered(m: int, n: int, decay: float, size: float, kind: str = "lora") -> nn.Linear:
    """A layer with falling singular values, and an adapter of a given size."""
    U, S, V = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    model = nn.Linear(n, m, bias=False)
    with torch.no_grad():
        model.weight.copy_(0.05 * (U * S * torch.linspace(3, decay, len(S))) @ V)
    pk.wrap(model, kind, **({"rank": 8} if kind == "lora" else {"block_size": 8}))
    train(model, size=size)
    return model


@pytest.mark.parametrize("kind", ["lora", "oft"])
@pytest.mark.parametrize("m, n", [(96, 64), (64, 160), (128, 128)])
@pytest.mark.parametrize("decay", [0.0, 0.2, 2.0])
def test_intruders_are_those_of_the_full_decomposition(kind: str, m: int, n: int, decay: float) -> None:
    """For every size of change and threshold, vector by vector."""
    seen = set()
    for size, threshold in itertools.product((0.01, 0.05, 0.2), (0.4, 0.6, 0.8)):
        torch.manual_seed(m + n)
        model = layered(m, n, decay, size, kind)
        W, (D,) = model.weight.detach().double(), change(model, {"default": 1.0}).values()
        before, S, _ = torch.linalg.svd(W, full_matrices=False)
        after, T, _ = torch.linalg.svd(W + D, full_matrices=False)
        truth = (after[:, :8].mT @ before[:, 3e-3 * S[0] < S]).abs().amax(1).tolist()
        gaps = ((T[:8] - T[1:9]) / T[0]).tolist()
        found = spectra(model, leading=8, threshold=threshold)[""]
        for i, (ours, exact) in enumerate(zip(found.similarity, truth, strict=True)):
            if min(gaps[max(0, i - 1)], gaps[i]) < 1e-3 or abs(exact - threshold) < 0.02:
                continue  # vectors of close values turn into each other, and near the threshold either answer is right
            assert (ours < threshold) == (exact < threshold), (size, threshold, i)
            if exact >= threshold:
                assert ours == pytest.approx(exact, abs=2e-2)
            else:
                assert ours >= exact - 2e-2
            seen.add(exact < threshold)
    assert seen == {True, False}, "no case had both"


def test_every_so_many_measurements() -> None:
    model = nn.Linear(16, 16)
    pk.wrap(model, "lora", rank=4)
    train(model)
    monitor, records = CSMonitor(model, interval=1, spectra=3), list[Record]()
    monitor.listeners.append(records.append)
    for _ in range(7):
        monitor.step()
    assert [bool(record.spectra) for record in records] == [False, False, True, False, False, True, False]
    assert records[2].spectra == spectra(model)


@pytest.mark.parametrize("kind", ["lora", "full", "oft"])
def test_a_run_that_diverged_has_no_ranks_and_goes_on(kind: str) -> None:
    model = nn.Linear(16, 16)
    pk.wrap(model, kind)
    train(model)
    next(iter(pk.adapter_parameters(model))).data.view(-1)[0] = float("nan")
    monitor, records = CSMonitor(model, interval=1, spectra=1), list[Record]()
    monitor.listeners.append(records.append)
    monitor.step()
    assert math.isnan(records[0].spectra[""].effective_rank)
    assert not records[0].finite


@pytest.mark.parametrize("options, message", [({"leading": -1}, "leading=-1"), ({"threshold": 1.5}, "threshold=1.5")])
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = nn.Linear(4, 4)
    pk.wrap(model, "lora", rank=1)
    with pytest.raises(OptionError, match=message):
        spectra(model, **options)
