"""A pass over data that looks at a model leaves it as it was, whatever happens, and says what it cannot look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peftkit as pk
from peftkit.errors import MergeStateError, OptionError, UnknownAdapterError, UnsetAdapterError, UnsupportedLayerError
from peftkit.training import contribution, explained_variance, gradient_energy, searched_gates
from peftkit.training.starts.start import start
from tests.support.experts import Bank
from tests.support.processes import distributed

Backward = Callable[[nn.Module, Any], None]
X = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


#: what looks at a wrapped model by a loss
LOOKS: dict[str, Callable[[nn.Module, Backward], object]] = {
    "lora-ga": lambda m, b: start(m, "lora-ga", [X], b),
    "gradient_energy": lambda m, b: gradient_energy(m, [X], b, most=2),
    "contribution": lambda m, b: contribution(m, [X], b),
    "searched_gates": lambda m, b: searched_gates(m, [(X, X)], b),
}
#: and these by inputs
SEES: dict[str, Callable[[nn.Module, Backward], object]] = {
    "eva": lambda m, b: start(m, "eva", [X], b),
    "explained_variance": lambda m, b: explained_variance(m, [X], b, most=2),
}


def network(**options: Any) -> nn.Sequential:
    """A trained adapter on layers with statistics, a dropout and a mode of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Conv1d(4, 2, 1))
    pk.wrap(model, "anchored", rank=1, start="given", **options)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
        parameter.grad = torch.ones_like(parameter)
    model[1].requires_grad_(True)
    model[3].adapters["default"].eval()  # type: ignore[index, union-attr]
    return model


def seen(model: nn.Module) -> dict[str, Any]:
    """All that can be seen of a model."""
    own: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.tolist()
        own[f"of {name}"] = id(parameter), parameter.requires_grad, grad
    for name, module in model.named_modules():
        route = getattr(getattr(module, "adapter_state", None), "route", None)
        own[f"in {name}"] = type(module), module.training, len(module._forward_pre_hooks), route
    return own


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(own, after[key]) if isinstance(own, Tensor) else own == after[key] for key, own in before.items()
    )


class StoppedError(Exception):
    """Of a loss that cannot be computed."""


def stopped(model: nn.Module, x: Tensor) -> None:
    backward(model, x)
    raise StoppedError


@pytest.mark.parametrize("how", [*LOOKS, *SEES])
def test_a_pass_that_fails_leaves_the_model(how: str) -> None:
    model = network()
    before = seen(model)
    with pytest.raises(StoppedError):
        (LOOKS | SEES)[how](model, stopped)
    assert same(before, seen(model))
    if how not in ("lora-ga", "eva"):  # these give the adapter its start
        (LOOKS | SEES)[how](model, backward)
        assert same(before, seen(model))


@pytest.mark.parametrize("how", LOOKS)
def test_what_does_not_act_is_not_looked_at(how: str) -> None:
    model, look = network(), LOOKS[how]
    for grads_off in (torch.no_grad(), torch.enable_grad()):
        with grads_off:
            look(model, backward)
    with torch.inference_mode(), pytest.raises(OptionError, match="inference_mode"):
        look(model, backward)
    if how != "gradient_energy":  # which looks at the weight, whatever adapters there are
        with pk.disabled(model), pytest.raises(OptionError, match="0: default does not act"):
            look(model, backward)
        with pytest.raises(OptionError, match="backward=3 was given"):
            look(model, 3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"0: .* is not finite"):
        look(model, lambda m, x: (m(x) * float("nan")).sum().backward())
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    pk.merge(model)
    with pytest.raises(MergeStateError, match="restore"):
        look(model, backward)


def test_what_has_no_inputs_is_not_seen() -> None:
    model = network()
    for look in SEES.values():
        with pytest.raises(OptionError, match="0: its input is not finite"):
            look(model, lambda m, x: m(x * float("nan")))
        with torch.inference_mode(), pytest.raises(OptionError, match="inference_mode"):
            look(model, backward)
    table = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    with pytest.raises(OptionError, match="0 is an embedding, whose input is numbers of rows"):
        explained_variance(table, [torch.arange(3)], targets="Embedding")
    with pytest.raises(UnsetAdapterError):
        explained_variance(nn.Linear(4, 4, device="meta"), [torch.ones(2, 4, device="meta")])
    stack = nn.Sequential(nn.Linear(24, 24), Bank(3))
    with pytest.raises(OptionError, match=r"1\.weight is a stack of experts"):
        gradient_energy(stack, [torch.randn(2, 24)], backward, targets=["Linear", "1.weight"])
    assert all(parameter.requires_grad for parameter in stack.parameters())


@pytest.mark.parametrize("how", ["gradient_energy", "contribution"])
def test_a_loss_that_zeroes_gradients_first_adds_to_those_of_other_batches(how: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    pk.wrap(model, "lora", rank=2)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    look = gradient_energy if how == "gradient_energy" else contribution
    x = [torch.randn(4, 8), torch.randn(4, 8)]

    def careful(model: nn.Module, x: Tensor) -> None:
        model.zero_grad()
        backward(model, x)

    expected = look(model, x, backward)
    assert look(model, x, careful) == expected
    assert look(model, x[1:], careful) != expected
    with pytest.raises(OptionError, match="which ends after one of 10 steps"):
        contribution(model, iter(x), backward)  # type: ignore[arg-type]


class Tied(nn.Module):
    """A head that shares its weight with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


def next_one(model: nn.Module, ids: Tensor) -> None:
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten()).backward()


def test_a_shared_weight_is_looked_at_in_all_its_places() -> None:
    model, twin, ids = Tied(), Tied(), torch.arange(20).reshape(4, 5) % 9
    next_one(twin, ids)
    G = twin.table.weight.grad
    assert G is not None
    exact = torch.linalg.svdvals(G.double()).square()
    found = gradient_energy(model, [ids], next_one, targets=["table", "head"], most=6)
    assert found == {"table": pytest.approx(exact.tolist(), rel=1e-4)}
    pk.wrap(model, "anchored", rank=2, start="given", targets=["table", "head"], tied="share")
    report = start(model, "lora-ga", [ids], next_one)
    assert report.energy["table"] == pytest.approx(float(exact[:4].sum() / exact.sum()), rel=1e-3)
    adapter: Any = model.table.adapters["default"]  # type: ignore[index]
    assert adapter is model.head.adapters["default"]  # type: ignore[index]
    nn.init.normal_(adapter.up, std=0.1)
    change = adapter(model.table.weight, 1.0).dense().detach().double()
    with torch.no_grad():
        twin.table.weight.add_(change / 2)
    twin.zero_grad()
    next_one(twin, ids)
    assert twin.table.weight.grad is not None
    expected = float((change * twin.table.weight.grad).abs().sum())
    assert contribution(model, [ids], next_one, steps=1) == {"table": pytest.approx(expected, rel=1e-3)}
    assert adapter is model.head.adapters["default"] is model.table.adapters["default"]  # type: ignore[index]


def test_inputs_are_seen_under_autocast_and_in_code_that_was_compiled_before() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)), torch.randn(16, 8)
    expected = explained_variance(model, [x], most=4)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = explained_variance(model, [x], most=4)
    assert narrow["0"] == pytest.approx(expected["0"], abs=1e-5) and narrow["2"] == pytest.approx(
        expected["2"], abs=0.1
    )
    pk.wrap(model, "lora", rank=2)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert start(compiled, "eva", [x]).energy == start(model, "eva", [x]).energy
    assert explained_variance(compiled, [x], most=4)["2"] == pytest.approx(expected["2"], abs=1e-5)


@pytest.mark.parametrize("layer", ["circular", "reflect", "output_size"])
def test_the_inputs_of_convolutions_with_sizes_of_their_own_are_whole(layer: str) -> None:
    """The trace of C is the sum of the squares of all that the kernel sees."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7)
    if layer == "output_size":
        module: nn.Module = nn.ConvTranspose1d(4, 3, 3, stride=2)
        shares = explained_variance(module, [x], lambda m, x: m(x, output_size=[16]), most=20)
        smaller = explained_variance(module, [x], most=20)
        assert sum(shares[""]) <= 1 + 1e-5 and shares != smaller
        return
    module = nn.Conv1d(4, 6, 3, padding=1, padding_mode=layer, groups=2)
    seen = nn.functional.pad(x, (1, 1), mode=layer).unfold(-1, 3, 1)  # (2, 4, 7, 3): of groups of two channels
    C = torch.einsum("ngcpk,ngdpl->ckdl", *[seen.unflatten(1, (2, 2))] * 2).reshape(6, 6).double()
    values = torch.linalg.eigvalsh(C).flip(0)
    found = explained_variance(module, [x], most=3)[""]
    assert found == pytest.approx((values / values.sum())[:3].tolist(), rel=1e-3)


def test_two_adapters_of_one_weight_are_told_apart() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    for name, rank in (("a", 1), ("b", 3)):
        pk.wrap(model, "anchored", rank=rank, start="given", name=name)
    assert start(model, "lora-ga", [x], backward).energy.keys() == {"0[a]", "0[b]"}
    for call in (
        lambda: start(model, "lora-ga", [x], backward, rho=2),
        lambda: searched_gates(model, [(x, x)], backward),
    ):
        with pytest.raises(UnknownAdapterError, match="say which by name="):
            call()
    assert start(model, "lora-ga", [x], backward, rho=2, name="b").energy.keys() == {"0"}


def test_ranks_go_no_further_than_a_matrix() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(9, 2), nn.Linear(2, 9)), torch.randn(40, 9)
    assert list(map(len, explained_variance(model, [x]).values())) == [2, 2]
    pk.wrap(model, "anchored", rank=2, start="given")
    start(model, "eva", [x], rho=4)
    with pytest.raises(OptionError, match="no rank is worth anything on these batches"):
        start(model, "lora-ga", [x], lambda m, x: (0 * m(x)).sum().backward(), rho=2)
    with pytest.raises(OptionError, match="seed=-1 was given"):
        start(model, "lora-ga", [x], backward, seed=-1)


def _in_a_group() -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        pk.wrap(model, "lora" if alone else "anchored", rank=2, **({} if alone else {"start": "given"}))
        return model

    alone = True
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    gates = searched_gates(made(), [(x, x)], backward)
    inside = DistributedDataParallel(made())
    for call in (
        lambda: searched_gates(inside, [(x, x)], backward),
        lambda: contribution(inside, [x], backward),
        lambda: pk.resize_(inside, {"0": 1}),
    ):
        with pytest.raises(UnsupportedLayerError, match="inside DistributedDataParallel already"):
            call()
    alone = False
    divided, whole = made(), made()
    fully_shard(divided, mesh=init_device_mesh("cpu", (2,)))
    start(whole, "pissa")
    start(divided, "pissa")
    first, second = (m[0].adapters["default"].up0 for m in (divided, whole))  # type: ignore[index, union-attr]
    assert torch.allclose(first, second)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedLayerError, match="ask for contributions before"):
        contribution(divided, [x], backward)
    return list(gates.values())


@pytest.mark.processes
@pytest.mark.slow
def test_a_group_of_processes_finds_the_same_gates(tmp_path: Path) -> None:
    first, second = distributed(_in_a_group, folder=tmp_path)
    assert first == second
