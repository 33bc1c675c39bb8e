"""One draw a step for the whole model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.training import Prefixes


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pk.wrap(net, rules=[pk.Rule("0", "dylora", rank=8, block=2), pk.Rule("1", "dylora", rank=4, block=1)])
    return net


def used(net: nn.Sequential) -> list[int]:
    """How many ranks have a gradient, a layer: B is 0 until the first step, and A's gradient with it."""
    net.zero_grad()
    net(torch.ones(1, 8)).square().sum().backward()
    ups = [parameter for name, parameter in net.named_parameters() if name.endswith("up")]
    return [int(up.grad.abs().sum(0).count_nonzero()) for up in ups if up.grad is not None]


def test_all_layers_use_the_same_share_of_their_ranks() -> None:
    net = model()
    prefixes, seen = Prefixes(net), Counter[int]()
    optimizer = torch.optim.SGD(pk.adapter_parameters(net), lr=0.0)
    handle = prefixes.attach(optimizer)
    for _ in range(200):
        first, second = used(net)
        assert first == 2 * second
        assert used(net) == [first, second]  # until the next step
        seen[second] += 1
        optimizer.step()
    assert set(seen) == {1, 2, 3, 4} and min(seen.values()) > 25
    handle.remove()
    pairs = [tuple(used(net)) for _ in range(50)]  # each layer draws for itself again
    assert any(first != 2 * second for first, second in pairs)


def test_a_run_goes_on_with_the_same_draws() -> None:
    first, second = Prefixes(model(), seed=3), Prefixes(model(), seed=4)
    first.draw()
    second.load_state_dict(first.state_dict())
    assert [first.draw() for _ in range(5)] == [second.draw() for _ in range(5)]


def test_a_model_without_such_an_adapter_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(net, "lora", rank=2)
    with pytest.raises(OptionError, match="a part at a time, as dylora has: wrap with"):
        Prefixes(net)
