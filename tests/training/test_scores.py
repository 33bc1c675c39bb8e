"""Scores: those of the whole gradients and inputs, near enough to choose the same ranks."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.training import contribution, explained_variance, gradient_energy, searched_gates, spread


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 16, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 6, 32), nn.Tanh(), nn.Linear(32, 5)
    )


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, 8, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(2)]


def test_gradient_energy_is_that_of_the_whole_gradient_and_the_model_stays() -> None:
    model, twin = network(), network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = gradient_energy(model, batches(), backward, most=4)
    for batch in batches():
        backward(twin, batch)
    for name, values in found.items():
        grad = twin.get_submodule(name).weight.grad
        assert isinstance(grad, Tensor)
        exact = torch.linalg.svdvals(grad.flatten(1))[:4].square()
        assert torch.tensor(values) == pytest.approx(exact, rel=0.35, abs=0.1 * float(exact[0]))
    assert found.keys() == {"0", "3", "5"} and model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and type(model[0]) is nn.Conv1d


def test_adapters_that_are_there_stay_and_what_is_not_used_is_worth_nothing() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    pk.wrap(model, "lora", rank=2)
    x = torch.randn(4, 8)
    found = gradient_energy(model, [x], lambda m, x: m["used"](x).square().sum().backward(), most=2)  # type: ignore[index]
    assert found["unused"] == [0, 0] and found["used"][0] > found["used"][1] > 0
    assert explained_variance(model, [x], lambda m, x: m["used"](x), most=2)["unused"] == [0, 0]  # type: ignore[index]
    assert len(pk.adapter_parameters(model)) == 4 and all(p.requires_grad for p in pk.adapter_parameters(model))


def test_a_plan_by_gradients_lowers_the_loss_more_than_equal_ranks() -> None:
    """By the best first step of these ranks, what scores promise: to first order, of the true gradient."""
    model, twin = network(), network()
    scores = gradient_energy(model, batches(), backward, most=8)
    for batch in batches():
        backward(twin, batch)

    def promised(plan: pk.Plan) -> float:
        total = 0.0
        for entry in plan.entries:
            grad = twin.get_submodule(entry.site.name).weight.grad
            assert isinstance(grad, Tensor)
            total += float(torch.linalg.svdvals(grad.flatten(1))[: entry.options.get("rank")].square().sum())
        return total

    equal, scored = pk.plan(model, "lora", budget="2KB"), pk.plan(model, "lora", budget="2KB", scores=scores)
    assert scored.bytes <= 2000 and promised(scored) > promised(equal)


def test_ranks_by_explained_variance_are_those_of_peft_s_eva() -> None:
    """On inputs without a mean, which PEFT takes away."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 14, bias=False), nn.Tanh(), nn.Linear(14, 6)
    )
    x = torch.randn(64, 12) * 0.7 ** torch.arange(12)
    x = torch.cat((x, -x))
    ours = copy.deepcopy(net)
    pk.wrap(ours, "lora", rank=3)
    scores = {name: own[:6] for name, own in explained_variance(ours, [x], most=10).items()}
    ranks = spread(scores, dict.fromkeys(scores, 1), 9)
    config = peft.LoraConfig(
        r=3, target_modules=["0", "2", "4"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.99)
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(net), config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    peft.initialize_lora_eva_weights(
        theirs,
        dataloader=[{"input": x}] * 12,
        forward_fn=lambda model, inputs: model(inputs["input"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    found = {name: theirs.base_model.model.get_submodule(name).r["default"] for name in ranks}
    assert ranks == found and sum(ranks.values()) == 9
    assert pk.resize_(ours, ranks) == {name: (3, rank) for name, rank in ranks.items() if rank != 3}
    again = copy.deepcopy(net)
    pk.wrap(again, "lora", rank=3)
    report = pk.start(again, "eva", [x], rho=2)
    assert report.ranks == {name: (3, rank) for name, rank in ranks.items() if rank != 3}
    assert {name: again.get_submodule(name).adapters["default"].options["rank"] for name in ranks} == ranks  # type: ignore[index, union-attr]
    pk.start(ours, "eva", [x])
    for name in ranks:
        first, second = (m.get_submodule(name).adapters["default"].down for m in (ours, again))  # type: ignore[index, union-attr]
        assert torch.allclose(first.abs(), second.abs(), atol=1e-4)  # type: ignore[union-attr, operator]


def test_contribution_is_the_integral_of_the_gradient_along_the_way() -> None:
    """Of a quadratic loss Σ(W·x − y)², whose gradient is linear in t, one midpoint is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    pk.wrap(model, "lora", rank=2)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter)
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    before, out = [p.clone() for p in model.parameters()], model(x)
    adapter: Any = model[0].adapters["default"]  # type: ignore[index]
    change = adapter(model[0].weight, 1.0).dense().detach()
    middle = model[0].weight + change / 2  # type: ignore[operator]
    expected = float((change * (2 * (x @ middle.mT - y).mT @ x)).abs().sum())
    for steps in (1, 4):
        found = contribution(model, [x], lambda m, x: (m(x) - y).square().sum().backward(), steps=steps)
        assert found == {"0": pytest.approx(expected)}
    assert torch.equal(model(x), out) and all(map(torch.equal, before, model.parameters()))
    assert [p.requires_grad for p in model.parameters()].count(True) == 2 and model[0].adapters["default"] is adapter  # type: ignore[index]


def test_gates_grow_where_an_adapter_helps_and_the_model_stays() -> None:
    """Two branches, of which the target needs one: what the other learns is noise."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"useful": nn.Linear(6, 6), "noise": nn.Linear(6, 6)})
    target = nn.Linear(6, 6)
    for parameter in model["noise"].parameters():
        nn.init.zeros_(parameter)
    pk.wrap(model, "lora", rank=4)
    held = [p.clone() for p in model.parameters()]

    def backward(model: Any, x: Tensor) -> None:
        guess = model["useful"](x) + model["noise"](torch.randn(len(x), 6))
        (guess - target(x)).square().mean().backward()

    data = torch.randn(120, 2, 16, 6).unbind()
    gates = searched_gates(model, [tuple(pair) for pair in data], backward, lr=2e-2, gate_lr=2e-2)  # type: ignore[misc]
    assert gates["useful"] > 1.05 > 0.95 > gates["noise"] and sum(gates.values()) == pytest.approx(2, rel=1e-4)
    assert all(map(torch.equal, held, model.parameters())) and all(p.grad is None for p in model.parameters())


def test_gates_act_on_every_kind_and_are_1_at_first() -> None:
    for kind in ("lora", "dora", "oft", "ia3", "glora", "lokr"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        pk.wrap(model, kind)
        for parameter in pk.adapter_parameters(model):
            nn.init.normal_(parameter, std=0.2)
        x = torch.randn(3, 8)
        out, seen = model(x), []

        def backward(model: nn.Module, x: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(model(x).detach())
            model(x).square().mean().backward()

        searched_gates(model, [(x, x)], backward)
        assert torch.allclose(seen[0], out, atol=1e-6) and not torch.allclose(seen[1], out)
        assert torch.equal(model(x), out)


def test_what_no_search_can_use_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    pk.wrap(model, "lora", rank=2)
    with pytest.raises(OptionError, match="no gradient came to the gates"):
        searched_gates(model, [], lambda m, x: None)
    with pytest.raises(OptionError, match="contribution is of adapters that are trained"):
        contribution(model, [torch.ones(2, 4)], lambda m, x: m(x).sum().backward())
    nn.init.normal_(pk.adapter_parameters(model)[0])
    nn.init.normal_(pk.adapter_parameters(model)[1])
    with pytest.raises(OptionError, match="0: no gradient came to it"):
        contribution(model, [], lambda m, x: m(x).sum().backward())
    assert len(pk.adapter_parameters(model)) == 2
