"""LISA: which blocks there are, how they are drawn, and what those that sleep take of memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import peftkit as pk
from peftkit.errors import OptionError, TargetError
from peftkit.training import GLAD, LISA
from tests.support.processes import distributed


class Net(nn.Module):
    """An embedding, blocks of two layers, and a head."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(blocks))
        self.head = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.head(h)


def net(kind: str = "full", **options: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    for targets in ("full", "Embedding"):
        pk.wrap(model, kind, targets=targets, name="default", **options)
    return model


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()


def training(model: nn.Module) -> set[str]:
    """The modules whose adapters require gradients."""
    return {name.partition(".adapters")[0] for name, p in model.named_parameters() if p.requires_grad}


def nbytes(model: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """Of the optimiser's state, and of gradients."""
    state = sum(t.nbytes for own in optimizer.state.values() for t in own.values())
    return state, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def test_blocks_are_by_number_and_the_rest_stays_awake() -> None:
    model = net()
    optimizer = AdamW(pk.adapter_parameters(model))
    rule = LISA(model, awake=2)
    handle = rule.attach(optimizer)
    assert list(rule.blocks) == [f"layers.{i}" for i in range(5)] and len(rule.awake) == 2
    expected = {f"{block}.{i}" for block in rule.awake for i in (0, 1)}
    assert training(model) == {"tokens", "head"} | expected
    step(model, optimizer)
    asleep = [p for block, own in rule.blocks.items() if block not in rule.awake for p in own]
    assert len(asleep) == 6 and all(p.grad is None and p not in optimizer.state for p in asleep)
    handle.remove()
    assert len(training(model)) == 12 and rule.awake == ()


def test_memory_is_that_of_the_blocks_that_are_awake() -> None:
    """Gradients and Adam's two moments, over many draws; without the rule all blocks have them."""
    model = net()
    optimizer = AdamW(pk.adapter_parameters(model))
    rule = LISA(model, every=1, awake=1)
    rule.attach(optimizer)
    ends, block = 2 * (7 * 8 * 4), 2 * (8 * 8 * 4)
    for _ in range(12):
        awake = rule.awake
        step(model, optimizer)
        state, gradients = nbytes(model, optimizer)
        kept = block if rule.awake == awake else 0  # a block that falls asleep is dropped at the end of the step
        counters = sum(own["step"].nbytes for own in optimizer.state.values())
        assert gradients == ends + kept and state - counters == 2 * (ends + kept)
    plain = AdamW(pk.adapter_parameters(unruled := net()))
    step(unruled, plain)
    assert nbytes(unruled, plain)[1] == ends + 5 * block


def test_blocks_are_drawn_uniformly_without_replacement() -> None:
    model = net()
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.0)
    rule = LISA(model, every=2, awake=2)
    rule.attach(optimizer)
    seen, draws = Counter[str](), []
    for _ in range(1000):
        optimizer.step()
        draws.append(rule.awake)
        assert len(set(rule.awake)) == 2
    assert all(a == b for a, b in zip(draws[1::2], draws[2::2], strict=False))  # for two steps each
    for draw in draws[1::2]:
        seen.update(draw)
    assert set(seen) == set(rule.blocks)
    # of 500 draws each block is in 200 on the average, ± 11
    assert all(abs(count - 200) < 45 for count in seen.values())


def test_groups_are_patterns_of_several_kinds_of_adapters() -> None:
    model = Net()
    pk.wrap(model, rules=[pk.Rule("layers.0", "oft", block_size=4), pk.Rule(["layers.1", "head"], "lora", rank=2)])
    rule = LISA(model, groups=["layers.0.0", ["layers.0", "*.1.1"], "Linear"], always="head", awake=1)
    counts = {block: len(own) for block, own in rule.blocks.items()}
    assert counts == {"layers.0.0": 1, "layers.0, *.1.1": 1 + 2, "Linear": 2}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"awake": 6}, OptionError, "awake=6 was given, at most 5, the number of blocks, was expected"),
        ({"every": 0}, OptionError, "every=0 was given, an integer from 1"),
        ({"always": "layers"}, OptionError, "groups=None was given, patterns, as no weight that may sleep has"),
        ({"groups": "layers"}, OptionError, "groups='layers' was given, a list of patterns"),
        ({"groups": ["layers.0", "layers.1"]}, OptionError, "is in none of them: add a group, or name it in always="),
        ({"groups": ["layers", "layers.1"]}, TargetError, "'layers.1' matches only what `always` and earlier groups"),
        ({"always": "*.norm"}, TargetError, r"target '\*.norm' matches no layer"),
        ({"groups": ["layers"], "name": "other"}, TargetError, "LISA: 'layers' matches no weight with an adapter"),
    ],
)
def test_what_makes_no_blocks_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    pk.wrap(model, "lora", targets="head", name="other")
    with pytest.raises(error, match=message):
        LISA(model, **{"name": "default", **options})


def test_an_optimiser_without_some_block_is_refused() -> None:
    """A block that is asleep when the optimiser is made would never train."""
    model = net()
    rule = LISA(model)
    first = AdamW(pk.adapter_parameters(model))
    handle = rule.attach(first)
    late = AdamW(pk.adapter_parameters(model))
    handle.remove()
    with pytest.raises(OptionError, match="the optimiser was made without parameters of block 'layers"):
        rule.attach(late)


def test_a_state_of_other_blocks_is_refused() -> None:
    model = net()
    rule = LISA(model)
    rule.attach(AdamW(pk.adapter_parameters(model)))
    other = LISA(net(), groups=["layers.0", "layers.1", "layers"], always=["head", "tokens"])
    with pytest.raises(OptionError, match="the state is of blocks layers"):
        other.load_state_dict(rule.state_dict())


def _under_ddp() -> list[torch.Tensor]:
    """What two processes with data of their own train, and what one trains of all of it."""
    rank, results = torch.distributed.get_rank(), []
    for divided in (True, False):
        model = net().double()
        optimizer = AdamW(pk.adapter_parameters(model), lr=0.1)
        run: nn.Module = model
        if divided:
            run = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
        LISA(run, every=1, awake=1).attach(optimizer)
        sharp = GLAD(run, rho=3.0)
        sharp.attach(optimizer)
        share = torch.tensor([rank]) if divided else torch.arange(2)
        for _ in range(4):
            optimizer.zero_grad()
            torch.cos(9 * run(share)).mean().backward()
            with sharp.perturbed():
                torch.cos(9 * run(share)).mean().backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return results


@pytest.mark.slow
@pytest.mark.processes
def test_processes_train_the_same_blocks_by_the_same_gradients(tmp_path: Path) -> None:
    """With LISA and GLAD, where gradients are views of what the second backward pass writes to."""
    for divided, whole in distributed(_under_ddp, folder=tmp_path):
        assert torch.allclose(divided, whole, atol=1e-9)
