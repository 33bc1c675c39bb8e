"""Starts from data: near the best direction that any start of the rank has, without keeping a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import Adapter
from peftkit.errors import OptionError
from peftkit.training.starts import CorDA, Factors, LoftQ, LoRAOne, LoRASB, Seen, Start
from peftkit.training.starts.start import STARTS, start
from tests.support.processes import distributed

RANK = 4
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(96, 128), (40, 96)),
    "conv": (lambda: nn.Conv2d(12, 32, 3, padding=1), (6, 12, 8, 8)),
    "grouped conv": (lambda: nn.Conv2d(24, 32, 3, groups=2, stride=2), (6, 24, 9, 9)),
    "transposed conv": (lambda: nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1), (6, 24, 5, 5)),
}


def problem(layer: str, seed: int = 0) -> tuple[nn.Module, list[Tensor], Callable[[nn.Module, Tensor], Tensor]]:
    """A layer, batches whose directions fall off, and a loss against a layer that differs in few directions."""
    make, size = LAYERS[layer]
    torch.manual_seed(seed)
    module, other = make(), make()
    channels = size[1]
    decay = 0.8 ** torch.arange(channels)
    mix = torch.linalg.qr(torch.randn(channels, channels))[0] * decay
    batches = [torch.einsum("nc...,dc->nd...", torch.randn(size), mix) for _ in range(3)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - other(x)).square().mean()

    return module, batches, loss


def gradient(module: nn.Module, batches: list[Tensor], loss: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """G (m, n) of all batches."""
    twin = copy.deepcopy(module)
    for x in batches:
        loss(twin, x).backward()
    pk.wrap(twin, "lora", rank=1)
    geometry = next(iter(twin.adapter_state.slots.values())).geometry  # type: ignore[union-attr]
    grad = twin.weight.grad
    assert isinstance(grad, Tensor)
    return geometry.matrix(grad).double()


def first_step(up: Tensor, down: Tensor, G: Tensor) -> Tensor:
    """The direction of ΔW after a step of gradient descent from a start."""
    up, down = up.double(), down.double()
    return up @ up.mT @ G + G @ down.mT @ down


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_first_step_from_lora_ga_is_as_good_as_any_of_its_rank(layer: str) -> None:
    module, batches, loss = problem(layer)
    G = gradient(module, batches, loss)
    x = batches[0]
    before, weight = module(x).detach(), module.weight.detach().clone()  # type: ignore[operator]
    pk.wrap(module, "anchored", rank=RANK, start="given")
    report = start(module, "lora-ga", batches, lambda m, x: loss(m, x).backward())
    adapter = module.adapters["default"]  # type: ignore[index]
    assert torch.equal(module(x), before) and torch.equal(module.weight, weight)
    found = cosine(first_step(adapter.up0, adapter.down0, G), G)
    values = torch.linalg.svdvals(G)
    best = float((values[: 2 * RANK].square().sum() / values.square().sum()).sqrt())
    assert found >= (0.98 if layer == "linear" else 0.9) * best
    assert report.energy[""] == pytest.approx(found**2, abs=0.15)  # an estimate
    assert all(p.grad is None for p in module.parameters())
    assert [p.requires_grad for p in module.parameters()].count(True) == 2
    # the paper's size: m^¼/√16, on orthonormal directions
    size = weight.shape[0] ** 0.25 / 4 if "transposed" not in layer else weight.shape[1] ** 0.25 / 4
    eye = torch.eye(RANK) * size**2
    assert torch.allclose(adapter.up0.mT @ adapter.up0, eye, atol=1e-4)
    assert torch.allclose(adapter.down0 @ adapter.down0.mT, eye, atol=1e-4)


def test_it_is_nearer_to_the_gradient_than_peft_s_start() -> None:
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    module, batches, loss = problem("linear")
    G = gradient(module, batches, loss)
    net = nn.Sequential(copy.deepcopy(module))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    inputs = [x.requires_grad_() for x in batches]  # PEFT's hooks ask for it
    preprocess_loraga(net, config, lambda: [loss(net, x).backward() for x in inputs])
    layer: Any = peft.get_peft_model(net, config).base_model.model[0]  # type: ignore[arg-type]
    theirs = cosine(first_step(layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach(), G), G)
    pk.wrap(module, "anchored", rank=RANK, start="given")
    start(module, "lora-ga", batches, lambda m, x: loss(m, x).backward())
    adapter = module.adapters["default"]  # type: ignore[index]
    assert cosine(first_step(adapter.up0, adapter.down0, G), G) > theirs


def test_gradients_that_were_there_are_not_added_to() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, "anchored", rank=2, start="given")
    for parameter in pk.adapter_parameters(model):
        parameter.grad = torch.ones_like(parameter)
    for how in ("lora-ga", "eva"):
        start(model, how, [torch.randn(4, 8)], lambda m, x: m(x).sum().backward())
    assert all(bool((p.grad == 1).all()) for p in pk.adapter_parameters(model) if p.grad is not None)
    assert all(p.grad is not None for p in pk.adapter_parameters(model))


@pytest.mark.parametrize("layer", ["linear", "conv", "grouped conv"])
def test_eva_takes_the_leading_directions_of_the_inputs(layer: str) -> None:
    module, batches, _ = problem(layer)
    pk.wrap(module, "anchored", rank=RANK, start="given")
    report = start(module, "eva", batches)
    adapter, geometry = module.adapters["default"], next(iter(module.adapter_state.slots.values())).geometry  # type: ignore[index, union-attr]
    C = torch.zeros(geometry.shape.columns, geometry.shape.columns, dtype=torch.float64)
    eye = torch.eye(len(C))
    for x in batches:  # every patch of every group of channels
        patches = geometry.contract(x, eye)
        patches = patches if not geometry.spatial else patches.unflatten(1, (-1, len(C))).movedim(2, -1).flatten(0, -2)
        C += patches.double().mT @ patches.double()
    V = adapter.down0.double()
    kept = torch.trace(V @ C @ V.mT)
    values = torch.linalg.eigvalsh(C)
    assert kept >= (0.98 if layer == "linear" else 0.85) * values[-RANK:].sum()  # the latter fall off slowly
    assert report.energy[""] == pytest.approx(float(kept / values.sum()), abs=0.05)
    assert torch.allclose(V @ V.mT, torch.eye(RANK, dtype=torch.float64), atol=1e-5) and not adapter.up0.any()


def test_a_model_of_many_layers_keeps_less_than_its_gradients(tmp_path: Path) -> None:
    """Adapters of other names and the gradients that were there stay as they are; a file has the start."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    base = copy.deepcopy(model)
    pk.wrap(model, "anchored", rank=2, start="given", name="style")
    pk.wrap(model, "lora", rank=2, name="other", targets="1")
    held = next(p for n, p in model.named_parameters() if n.endswith("other.up"))
    held.grad = torch.ones_like(held)
    batches = [torch.randn(16, 256) for _ in range(2)]
    report = start(model, "lora-ga", batches, lambda m, x: m(x).square().mean().backward(), name="style")
    assert held.grad is not None and bool((held.grad == 1).all())
    assert report.energy.keys() == {"0", "1", "2", "3"} and "on 4 modules" in str(report)
    assert report.extra_bytes == 4 * 4 * 256 * (16 + 33) < 4 * sum(p.numel() for p in base.parameters()) / 4
    pk.load(base, pk.save(model, tmp_path / "a.safetensors", name="style", allow_zero=True))
    assert torch.equal(base[2].adapters["style"].up0, model[2].adapters["style"].up0)  # type: ignore[index]


@pytest.mark.parametrize(
    "how, options, batches, message",
    [
        ("lora-ga", {"start": "pissa"}, [1], "anchored takes no such start as lora-ga"),
        ("lora_ga", {"start": "given"}, [1], "how='lora_ga' was given"),
        ("lora-ga", {"start": "given"}, [], "no gradient came to it: give batches"),
        ("eva", {"start": "given"}, [], "it was not called: give batches"),
    ],
)
def test_what_cannot_start_is_said_and_leaves_the_model(
    how: str, options: Any, batches: list[int], message: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, "anchored", rank=2, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OptionError, match=message):
        start(model, how, [torch.ones(2, 8) for _ in batches], lambda m, x: m(x).sum().backward())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def given(module: nn.Module, kind: str = "anchored", rank: int = RANK) -> Adapter:
    """Wrap a layer for a start, and return its adapter."""
    options: dict[str, Any] = {} if kind in ("lora", "lora-fa") else {"start": "given"}
    pk.wrap(module, kind, rank=rank, **options)
    return module.adapters["default"]  # type: ignore[index, return-value]


def backward_of(loss: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], None]:
    return lambda m, x: loss(m, x).backward()


@pytest.mark.parametrize("how", STARTS)
def test_no_start_moves_the_model(how: str, tmp_path: Path) -> None:
    """Bit for bit in bf16 too; training then moves it, and a file has the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Unflatten(1, (2, 6)), nn.Conv1d(2, 8, 3)).bfloat16()
    base, x = copy.deepcopy(model), torch.randn(5, 12).bfloat16()
    before = model(x)
    pk.wrap(model, "lora-xs" if how == "lora-sb" else "anchored", rank=2, start="given")
    report = start(model, how, [x], lambda m, x: m(x).square().sum().backward())
    assert torch.equal(model(x), before) and report.modules == 2 and report.how == how and how in str(report)
    assert all(0 < share <= 1 for share in (*report.energy.values(), *report.alignment.values()))
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    after = model(x)
    assert not torch.equal(after, before)
    pk.load(base, pk.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(base(x), after)


@pytest.mark.parametrize("layer", LAYERS)
def test_alignment_is_that_of_the_whole_gradient(layer: str) -> None:
    for how in ("lora-ga", "lora-one"):
        module, batches, loss = problem(layer)
        G, adapter = gradient(module, batches, loss), given(module)
        report = start(module, how, batches, backward_of(loss), oversample=8)
        found = cosine(first_step(adapter.get_buffer("up0"), adapter.get_buffer("down0"), G), G)
        assert report.alignment[""] == pytest.approx(found, abs=0.05)


@pytest.mark.parametrize("sign", [False, True])
def test_lora_sb_trains_the_projection_of_the_gradient(sign: bool) -> None:
    module, batches, loss = problem("conv")
    G, adapter = gradient(module, batches, loss), given(module, "lora-xs")
    before = module(batches[0])
    report = start(module, LoRASB(sign=sign), batches, backward_of(loss), oversample=8)
    assert torch.equal(module(batches[0]), before)
    U, V = adapter.get_buffer("left").double(), adapter.get_buffer("right").double()
    eye = torch.eye(RANK, dtype=torch.float64)
    assert torch.allclose(U.mT @ U, eye, atol=1e-5) and torch.allclose(V @ V.mT, eye, atol=1e-5)
    for x in batches:
        loss(module, x).backward()
    core = adapter.get_parameter("core").grad
    assert core is not None and torch.allclose(core.double(), U.mT @ G @ V.mT, atol=1e-5)
    whole = cosine(U @ (U.mT @ G @ V.mT) @ V, G)
    assert report.alignment[""] == pytest.approx(whole, abs=0.05)
    if sign:
        best = torch.linalg.svdvals(G.sign())[:RANK].square().sum() / G.numel()
        assert report.energy[""] == pytest.approx(float(best), abs=1e-3)
        assert float(torch.trace(U.mT @ G.sign() @ V.mT).abs()) > 0.99 * float(
            torch.linalg.svdvals(G.sign())[:RANK].sum()
        )


def test_lora_one_may_begin_after_its_step() -> None:
    module, batches, loss = problem("linear")
    G, adapter = gradient(module, batches, loss), given(module)
    start(module, LoRAOne(stable=2, first_step=True), batches, backward_of(loss), oversample=8)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    expected = -0.5 * (U[:, :RANK] * S[:RANK] / S[0]) @ V[:RANK]
    assert cosine(adapter(torch.zeros(128, 96), 1.0).dense().detach().double(), expected) > 0.99


@pytest.mark.parametrize("kind", ["lora", "lora-fa", "anchored"])
def test_eva_is_for_all_that_begin_at_b_of_zero(kind: str) -> None:
    module, batches, _ = problem("conv")
    adapter = given(module, kind)
    start(module, "eva", batches)
    A = adapter.get_buffer("down0") if kind == "anchored" else adapter.state_dict()["down"]
    assert torch.allclose(A @ A.mT, torch.eye(RANK), atol=1e-5)
    with pytest.raises(OptionError, match=r"lora takes no such start as pissa|wrap with the kind|start"):
        start(module, "lora-sb", batches, lambda m, x: m(x).sum().backward())


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_peft_s_where_the_sketch_is_whole(mode: str) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12, bias=False))
    data = [torch.randn(64, 8) * (0.7 ** torch.arange(8))]  # PEFT weighs every batch by its largest input
    ours = copy.deepcopy(net)
    adapter = given(ours[0], rank=2)
    start(ours, CorDA(mode), data)
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode)
    )
    preprocess_corda(net, config, run_model=lambda: [net(x) for x in data])  # type: ignore[arg-type]
    layer: Any = peft.get_peft_model(net, config).base_model.model[0]  # type: ignore[arg-type]
    theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(adapter.get_buffer("up0") @ adapter.get_buffer("down0"), theirs, atol=1e-4)


@pytest.mark.parametrize("how", ["pissa", "milora", "olora"])
def test_starts_of_the_base_are_those_of_the_kind(how: str) -> None:
    torch.manual_seed(0)
    W = nn.Linear(10, 12)
    first, second = copy.deepcopy(W), copy.deepcopy(W)
    pk.wrap(first, "anchored", rank=3, start=how)
    adapter = given(second, rank=3)
    start(second, how)
    for name in ("up0", "down0"):
        assert torch.equal(adapter.get_buffer(name), first.adapters["default"].get_buffer(name))  # type: ignore[index]


def test_orthogonal_factors_have_no_product() -> None:
    model = nn.Linear(10, 12)
    adapter = given(model, rank=4)
    start(model, "orthogonal", seed=1)
    B, A = adapter.get_buffer("up0"), adapter.get_buffer("down0")
    assert (B @ A).abs().max() < 1e-6 and B.norm() > 0.1 and A.norm() > 0.1
    odd = nn.Linear(10, 12)
    given(odd, rank=3)
    with pytest.raises(OptionError, match="orthogonal needs an even one"):
        start(odd, "orthogonal")


@pytest.mark.parametrize("kind", ["lora", "anchored"])
def test_loftq_begins_nearer_to_the_weights_before_quantising(kind: str) -> None:
    """The best of its rank: what is left are the other singular values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 24, 3), nn.Flatten())
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 20).round() / 20)
    adapter = given(model[0], kind)
    start(model, LoftQ(original))
    W, Q = original["0.weight"].flatten(1), model[0].weight.flatten(1)  # type: ignore[union-attr]
    left = (Q + adapter(Q, 1.0).dense() - W).norm()
    assert torch.isclose(left, torch.linalg.svdvals(W - Q)[RANK:].norm(), rtol=1e-3)
    with pytest.raises(OptionError, match=r"original has no .0.weight"):
        start(model, LoftQ({}))
    with pytest.raises(OptionError, match="give the weights of this model"):
        start(model, LoftQ({"0.weight": torch.zeros(3, 4, 3, 3)}))
    with pytest.raises(OptionError, match="pass LoftQ"):
        start(model, "loftq")


def test_ranks_go_where_the_gradient_is() -> None:
    """An adapter that gets no rank is taken off; the others start as they would with their new rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[2].weight.mul_(1e-4)  # so that hardly a gradient comes to the first two
    before, x, y = model(torch.ones(1, 16)), torch.randn(64, 16), torch.randn(64, 16)
    pk.wrap(model, "anchored", rank=2, start="given", alpha=4)
    report = start(model, "lora-ga", [x], lambda m, x: (m(x) - y).square().sum().backward(), rho=3)
    assert report.ranks == {"0": (2, 0), "1": (2, 0), "2": (2, 6)} and report.modules == 1
    adapter: Any = model[2].adapters["default"]  # type: ignore[index]
    assert adapter.scale == 2 and adapter.up0.shape == (16, 6) and type(model[0]) is nn.Linear
    assert torch.equal(model(torch.ones(1, 16)), before) and "other ranks on 3" in str(report)
    with pytest.raises(OptionError, match="pissa looks at no data"):
        start(model, "pissa", rho=2)
    with pytest.raises(OptionError, match="rho=5 was given, a number from 1 to oversample/2, 4"):
        start(model, "lora-ga", [x], rho=5)


def _started(how: str, batches: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Conv1d(1, 4, 3))
    pk.wrap(model, "anchored", rank=2, start="given")

    def backward(model: nn.Module, x: Tensor) -> None:
        model(x).square().sum().backward()

    start(model, how, batches, backward)
    return [t for name, t in model.state_dict().items() if name.endswith(("up0", "down0"))]


def _divided(how: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(8, 1, 24, generator=generator) for _ in range(4)]
    return _started(how, batches[torch.distributed.get_rank() :: 2])


@pytest.mark.processes
@pytest.mark.parametrize("how", ["lora-ga", pytest.param("eva", marks=pytest.mark.slow)])
def test_processes_with_a_part_of_the_data_each_get_the_start_of_one_with_all(how: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    alone = _started(how, [torch.randn(8, 1, 24, generator=generator) for _ in range(4)])
    first, second = distributed(_divided, how, folder=tmp_path)
    for one, other, expected in zip(first, second, alone, strict=True):
        assert torch.equal(one, other)
        signs = (one * expected).sum(0 if one.shape[0] > one.shape[1] else 1, keepdim=True).sign()
        assert torch.allclose(one * signs, expected, atol=1e-4)  # singular vectors have no sign of their own


@pytest.mark.parametrize("how", ["pissa", "milora", "olora", "corda", "lora-ga"])
@pytest.mark.parametrize("alpha", [-2.0, 1e-20, 1e20])
def test_starts_are_finite_under_any_scale(how: str, alpha: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(12, 8)
    before = model(x)
    pk.wrap(model, "anchored", rank=2, start="given", alpha=alpha)
    report = start(model, how, [x], lambda m, x: m(x).square().sum().backward())
    adapter: Any = model[0].adapters["default"]  # type: ignore[index]
    assert torch.equal(model(x), before) and bool(adapter.up0.isfinite().all() and adapter.down0.isfinite().all())
    assert 0 < report.energy["0"] < float("inf")
    if how == "pissa":
        U, S, V = torch.linalg.svd(model[0].weight.detach().double())  # type: ignore[arg-type]
        found = adapter.scale * adapter.up0.double() @ adapter.down0.double()
        assert torch.allclose(found, (U[:, :2] * S[:2]) @ V[:2], atol=1e-5)


@dataclass(frozen=True)
class Own(Start):
    """A start that is not what it should be."""

    up: Tensor
    name: ClassVar[str] = "own"
    gives: ClassVar[frozenset[str]] = frozenset({"factors"})

    def factors(self, seen: Seen) -> Factors:
        return Factors(self.up, torch.zeros(seen.rank, seen.weight.shape[1]))


def test_a_start_that_fits_no_weight_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    adapter = given(model[0], rank=2)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    for up, message in (
        (torch.zeros(1, 1), r"0: own gave factors \(1, 1\) and \(2, 8\), \(6, 2\) and \(2, 8\) were expected"),
        (torch.full((6, 2), float("nan")), "0: the start that own found is not finite"),
    ):
        with pytest.raises(OptionError, match=message):
            start(model, Own(up))
    with pytest.raises(OptionError, match="original='x' was given"):
        LoftQ("x")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"original has numbers in '0\.weight' that are not finite"):
        start(model, LoftQ({"0.weight": torch.full((6, 8), float("inf"))}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(OptionError, match="0: its weight is not finite: load a base that is sound"):
        start(model, "pissa")
    nothing = nn.Sequential(nn.Linear(8, 6))
    pk.wrap(nothing, "anchored", rank=2, start="given", alpha=0.0)
    with pytest.raises(OptionError, match="0: alpha=0 makes every start 0"):
        start(nothing, "olora")
