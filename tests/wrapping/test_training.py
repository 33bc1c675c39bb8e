"""What a training stack does to an adapted model: compile, autocast, checkpointing, DDP; and what it keeps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkit as pk
from peftkit.bench.step import kept
from peftkit.wrapping.check import CheckError
from tests.support.processes import distributed
from tests.support.zoo import train

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "loha": {"rank": 3},
    "lokr": {"factor": 4},
    "loldu": {"rank": 4},
    "dora": {"rank": 4},
    "oft": {"block_size": 8},
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(32, 48), (64, 32)),
    "conv2d": (lambda: nn.Conv2d(16, 32, 3, padding=1), (2, 16, 6, 6)),
}


def cell(kind: str, layer: str, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = LAYERS[layer]
    module, x = make(), torch.randn(size)
    pk.wrap(module, kind, **KINDS[kind], **kwargs)
    train(module)
    return module, x


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_size_of_the_weight_waits_for_backward(kind: str, layer: str, route: str) -> None:
    """Beyond the frozen weight itself and the layer's input, what autograd keeps is smaller than the weight."""
    torch.manual_seed(0)
    if layer == "linear":
        module, x = nn.Linear(256, 256), torch.randn(4, 256, requires_grad=True)
    else:
        module, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 4, 4, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        pk.wrap(module, kind, route=route, **KINDS[kind])
        own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:  # noqa: B023
                kept[storage.data_ptr()] = storage.nbytes()  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x.to(dtype)).float().square().sum()
        assert max(kept.values(), default=0) < module.weight.nbytes, f"{dtype}: {sorted(kept.values())[-3:]}"
        pk.unwrap(module)


#: channels of activations that wait for backward beside the layer's input: those between factors, one output at most
BETWEEN = {"lora": 4, "loha": 16, "lokr": 2 * 4 * 8, "loldu": 2 * 4, "dora": 4 + 256, "oft": 256, "ia3": 256}


@pytest.mark.parametrize("tokens", [64, 2048])
@pytest.mark.parametrize("kind", BETWEEN)
def test_activations_wait_for_backward_once(kind: str, tokens: int) -> None:
    """On both sides of the sizes at which torch's own graph takes over."""
    module, x = nn.Linear(256, 256), torch.randn(tokens, 256, requires_grad=True)
    options = {"oft": {"block_size": 32}, "ia3": {}, "lokr": {"rank": 4, "factor": 8}}.get(kind, {"rank": 4})
    pk.wrap(module, kind, route="factored", **options)
    factors = sum(p.nbytes for p in pk.adapter_parameters(module))
    assert 0 < kept(module, x) <= 4 * tokens * BETWEEN[kind] + 3 * factors + 8192


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_traces_whole_and_strength_is_data(kind: str, route: str) -> None:
    """Forward and backward without a graph break, and one graph for every strength."""
    torch._dynamo.reset()
    module, x = cell(kind, "conv2d" if kind in ("lora", "oft") else "linear", route=route)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for i, strength in enumerate((1.0, 0.5, -2.0)):
        pk.set_strength(module, strength)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            y = compiled(x)
        torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)
        parameters = pk.adapter_parameters(module)
        ours = torch.autograd.grad(y.square().sum(), parameters)
        eager = torch.autograd.grad(module(x).square().sum(), parameters)
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, layer: str, route: str) -> None:
    """Under autocast an adapted fp32 layer gives a bf16 output near the fp32 one, and fp32 gradients."""
    module, x = cell(kind, layer, route=route)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 2e-2 * exact.norm()
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in pk.adapter_parameters(module))
    with torch.autocast("cpu", dtype=torch.bfloat16), pk.disabled(module):
        base = module(x)
    pk.unwrap(module)
    pk.wrap(module, kind, **KINDS[kind])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    module, x = cell(kind, "linear")
    module, x = module.double(), x.double().requires_grad_(True)
    parameters = pk.adapter_parameters(module)
    module(x).square().sum().backward()
    plain = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    y = checkpoint(module, x, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.square().sum().backward()
    for a, b in zip(plain, parameters, strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-10, atol=1e-10)


def _in_parallel() -> dict[str, list[Tensor]]:
    """The gradients of a batch of which every process sees its share."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for kind in KINDS:
        module, x = cell(kind, "linear")
        parallel = nn.parallel.DistributedDataParallel(module)
        parallel(x[rank::world]).square().mean().backward()
        found[kind] = [parameter.grad for parameter in pk.adapter_parameters(module)]
    return found


@pytest.mark.processes
def test_ddp(tmp_path: Path) -> None:
    found = distributed(_in_parallel, folder=tmp_path)
    for kind in KINDS:
        module, x = cell(kind, "linear")
        expected = torch.autograd.grad(module(x).square().mean(), pk.adapter_parameters(module))
        for gradients in found:
            torch.testing.assert_close(gradients[kind], list(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    x, target = torch.randn(64, 16), torch.randn(64, 8)
    pk.wrap(model, kind, targets="Linear", **KINDS[kind])
    base = {k: v.clone() for k, v in model.state_dict().items() if "adapters" not in k}
    optimizer = torch.optim.Adam(pk.adapter_parameters(model), lr=0.02)
    losses = []
    for _ in range(80):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items() if k in base)
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (clone, torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        pk.unwrap(twin)
        assert type(twin[0]) is nn.Linear


class TestCheck:
    def test_finds_what_never_runs_and_what_gets_no_gradient(self) -> None:
        class Unfinished(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.forgotten, self.cut = (nn.Linear(4, 4) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                return self.used(x) + self.cut(x).detach()

        net, x = Unfinished(), torch.randn(2, 4)
        pk.wrap(net, "lora", rank=2)
        net.used.adapters["default"].up.grad = torch.ones(4, 2)
        state = torch.get_rng_state()
        report = pk.check(net, x)
        assert report.ran == ("used[default]", "cut[default]")
        assert report.never_ran == ("forgotten[default]",)
        assert report.no_gradient == ("cut[default]",)
        assert not report.ok
        assert "never ran: forgotten[default]" in str(report)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(net.used.adapters["default"].up.grad, torch.ones(4, 2))
        assert not any(m._forward_hooks for m in net.modules())

    @pytest.mark.parametrize("batch", [torch.ones(2, 4), (torch.ones(2, 4),), {"input": torch.ones(2, 4)}], ids=str)
    def test_batches(self, batch: Any) -> None:
        layer = nn.Linear(4, 4)
        pk.wrap(layer, "dora", rank=2)
        assert pk.check(layer, batch, loss=lambda y: y.square().sum()).ok

    def test_says_when_there_is_nothing_to_differentiate(self) -> None:
        layer = nn.Linear(4, 4)
        pk.wrap(layer, "lora")
        with pk.disabled(layer), pytest.raises(CheckError, match="no adapter acts"):
            pk.check(layer, torch.ones(2, 4))
