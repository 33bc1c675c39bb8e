"""Starts from data: near the best direction that any start of the rank has, without keeping a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.training import start

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
    assert report.energy[""] == pytest.approx(float(kept / values.sum()), abs=0.15)
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
    assert report.extra_bytes == 4 * 4 * 256 * (8 + 17) < 4 * sum(p.numel() for p in base.parameters()) / 4
    pk.load(base, pk.save(model, tmp_path / "a.safetensors", name="style", allow_zero=True))
    assert torch.equal(base[2].adapters["style"].up0, model[2].adapters["style"].up0)  # type: ignore[index]


@pytest.mark.parametrize(
    "how, options, batches, message",
    [
        ("lora-ga", {"start": "pissa"}, [1], "anchored takes no start from data"),
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
