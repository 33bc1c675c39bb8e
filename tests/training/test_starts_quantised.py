"""Starts on quantised bases: LoftQ brings the model nearer to the exact one, and the others see the gradients of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.training import explained_variance, gradient_energy
from peftkit.training.starts import LoftQ
from peftkit.training.starts.start import STARTS, start
from tests.support.matrix_quantised import COLUMNS, ROWS, dequantised, network, quantised
from tests.training.test_stand_in import backward

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
X = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("base", ["bitsandbytes nf4 double", "bitsandbytes int8", "torchao int4", "torchao fp8"])
@pytest.mark.parametrize("kind", ["lora", "anchored"])
def test_loftq_brings_the_output_nearer_to_the_exact_layer(base: str, kind: str) -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(COLUMNS, ROWS))
    model = nn.Sequential(quantised(base))  # of the same weight
    model.eval()
    before = (model(X) - exact(X)).norm()
    held = {name: tensor.clone() for name, tensor in exact.state_dict().items()}
    pk.wrap(model, kind, rank=16, **({} if kind == "lora" else {"start": "given"}))
    Q = dequantised(model)[0].weight.detach()  # type: ignore[union-attr]
    report = start(model, LoftQ(held))
    lost = held["0.weight"] - Q  # type: ignore[operator]
    adapter = model[0].adapters["default"]  # type: ignore[index]
    left = (adapter(Q, 1.0).dense() - lost).norm().detach()  # type: ignore[operator, union-attr]
    assert torch.isclose(left, torch.linalg.svdvals(lost)[16:].norm(), rtol=1e-2)
    assert report.energy["0"] == pytest.approx(1 - float(left / lost.norm()) ** 2, abs=1e-2)
    assert (model(X) - exact(X)).norm() < 0.95 * before  # int8 rounds its inputs too


@pytest.mark.parametrize("how", [how for how in STARTS if how not in ("milora", "olora")])
def test_every_start_is_that_of_the_weights_which_quantised_ones_stand_for(how: str) -> None:
    found = []
    for model in (network("bitsandbytes nf4"), dequantised(network("bitsandbytes nf4"))):
        before = model(X)
        pk.wrap(model, "lora-xs" if how == "lora-sb" else "anchored", rank=2, start="given")
        report = start(model, how, [X], backward)
        assert torch.allclose(model(X), before, atol=1e-6)
        found.append(report)
    for own, other in zip(found[0].energy.values(), found[1].energy.values(), strict=True):
        assert own == pytest.approx(other, rel=1e-3)


def test_scores_and_budgets_are_those_of_the_weights_which_quantised_ones_stand_for() -> None:
    model, plain = network("bitsandbytes nf4"), dequantised(network("bitsandbytes nf4"))
    plans = []
    for each in (model, plain):
        scores = gradient_energy(each, [X], backward, most=4), explained_variance(each, [X], most=4)
        plan = pk.plan(each, "lora", budget="6KB", scores=scores[0])
        plans.append((scores, [entry.options for entry in plan.entries], pk.wrap(each, rules=plan.rules).bytes))
    (first, *own), (second, *other) = plans
    assert own == other
    for one, two in zip(first, second, strict=True):
        assert one == {name: pytest.approx(values, rel=1e-3, abs=1e-6) for name, values in two.items()}
