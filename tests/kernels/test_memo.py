"""What is kept between calls is what would be made anew, whoever wrote what in between and how."""

from __future__ import annotations

import copy
import pickle
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.delta import Hadamard
from peftkit.kernels.cache import Memo
from tests.support.laws import refusal, wrapped
from tests.support.zoo import ADAPTERS


@torch.no_grad()
def test_a_memo_makes_what_has_changed_and_nothing_else() -> None:
    made: list[float] = []

    def make_sum() -> float:
        made.append(float(a.sum()))
        return made[-1]

    memo, a, b = Memo[float](), torch.ones(3), nn.Parameter(torch.zeros(2))
    assert [memo(make_sum, a, b) for _ in range(4)] == [3] * 4
    assert len(made) == 2  # one call alone keeps nothing
    a.data[0] = 5
    assert memo(make_sum, a, b) == 7
    b.data.add_(1)
    memo(make_sum, a, b)
    memo(make_sum, a, b)
    assert len(made) == 4
    memo(make_sum, a, b.double())
    assert len(made) == 5
    for other in (copy.deepcopy(memo), pickle.loads(pickle.dumps(memo))):
        other(make_sum, a, b)
    assert len(made) == 7
    a[0] = float("nan")  # equal to nothing, itself neither
    memo(make_sum, a, b)
    memo(make_sum, a, b)
    assert len(made) == 9


def test_nothing_is_kept_where_gradients_are_asked_for() -> None:
    made: list[int] = []
    memo, a = Memo[None](), torch.ones(3)
    for _ in range(3):
        memo(lambda: made.append(1), a)
    assert len(made) == 3
    delta = Hadamard(*(torch.randn(size).requires_grad_() for size in ((4, 2), (2, 5)) * 2))
    with torch.no_grad():
        assert delta.khatri_rao is delta.khatri_rao
    assert delta.khatri_rao.B.requires_grad


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_write_is_seen(adapter: str) -> None:
    """To any parameter, through .data too, as averages of weights are put in their place; and to the weight."""
    layer = next(layer for layer in ("linear", "conv2d k3") if refusal(adapter, layer) is None)
    module, x = wrapped(adapter, layer)
    module.eval()
    weight = cast(Tensor, module.weight)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (*pk.adapter_parameters(module), weight):
            before = [module(x) for _ in range(3)][-1]
            (parameter if parameter is weight else parameter.data).add_(0.1 * torch.randn_like(parameter))
            now = module(x)
            assert not torch.equal(now, before)
            assert torch.equal(now, copy.deepcopy(module)(x))
