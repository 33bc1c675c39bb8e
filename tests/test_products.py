"""The fused products: the same numbers as their definitions, once and twice differentiated, in every memory format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit as pk
from peftkit import products, routes
from peftkit.delta.base import Delta
from tests.laws import close
from tests.zoo import ADAPTERS, LAYERS, make, smallest_kernel, train

#: an activation with 12 channels by its shape, its spatial dimensions and how its memory is laid out
ACTIVATIONS: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor], Tensor]]] = {
    "rows": ((5, 12), 0, lambda t: t),
    "a vector": ((12,), 0, lambda t: t),
    "tokens": ((2, 3, 12), 0, lambda t: t),
    "planes": ((2, 12, 3, 2), 2, lambda t: t),
    "one plane": ((12, 4), 1, lambda t: t),
    "channels last": ((2, 12, 3, 2), 2, lambda t: t.contiguous(memory_format=torch.channels_last)),
    "transposed": ((2, 12, 3, 2), 2, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
}


def drawn(name: str, channels: int = 12) -> tuple[Tensor, int]:
    shape, spatial, layout = ACTIVATIONS[name]
    shape = tuple(channels if size == 12 else size for size in shape)
    return layout(torch.randn(shape, dtype=torch.float64)).requires_grad_(), spatial


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def channels(v: Tensor, spatial: int) -> Tensor:
    return v[(...,) + (None,) * spatial]


def agree(fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    torch.testing.assert_close(fused(*inputs), plain(*inputs))
    with torch.no_grad():
        torch.testing.assert_close(fused(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradgradcheck(fused, inputs)


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_add_pointwise(name: str, runs: int) -> None:
    (out, spatial), (h, _) = drawn(name), drawn(name, 2 * runs)
    B = parameter(12 // runs, 2)

    def plain(out: Tensor, h: Tensor, B: Tensor) -> Tensor:
        mixed = torch.einsum("vr,...arz->...avz", B, h.reshape(*h.shape[: h.dim() - 1 - spatial], runs, 2, -1))
        return out + mixed.reshape(out.shape)

    agree(lambda out, h, B: products.add_pointwise_(out.clone(), h, B, spatial), plain, [out, h, B])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rotated(name: str, bias: bool) -> None:
    y, spatial = drawn(name)
    K = parameter(3, 4, 4)

    def plain(y: Tensor, K: Tensor, *b: Tensor) -> Tensor:
        wx = y - channels(b[0], spatial) if b else y
        rows = wx.movedim(-1 - spatial, -1) @ torch.block_diag(*K).mT
        return y + rows.movedim(-1, -1 - spatial)

    fused: Callable[..., Tensor] = lambda y, K, *b: products.rotated(y, K, b[0] if b else None, spatial)  # noqa: E731
    agree(fused, plain, [y, K, parameter(12)] if bias else [y, K])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rescaled(name: str, bias: bool) -> None:
    y, spatial = drawn(name)

    def plain(y: Tensor, e: Tensor, *b: Tensor) -> Tensor:
        return y + channels(e, spatial) * (y - channels(b[0], spatial) if b else y)

    fused: Callable[..., Tensor] = lambda y, e, *b: products.rescaled(y, e, b[0] if b else None, spatial)  # noqa: E731
    agree(fused, plain, [y, parameter(12), parameter(12)] if bias else [y, parameter(12)])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("layer", ["linear", "conv2d k3", "conv2d channels last", "conv2d k1 g2", "transposed2d"])
def test_the_fused_route_is_the_plain_one(adapter: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient, with the fused products and without."""
    module, x = make(layer)
    if max(module.weight.shape[2:], default=1) > smallest_kernel(adapter):
        pytest.skip("GLoRA takes kernels of 1 only")
    case = ADAPTERS[adapter]
    try:
        pk.wrap(module, case.kind, route="factored", **case.options)
    except pk.errors.OptionError as refusal:
        pytest.skip(str(refusal))
    train(module)
    x.requires_grad_()
    wanted = [x, *pk.adapter_parameters(module)]

    def step() -> tuple[Tensor, ...]:
        y = module(x)
        return y, *torch.autograd.grad(y.square().sum(), wanted)

    fused = step()
    monkeypatch.setattr(Delta, "onto", _plainly)
    monkeypatch.setattr("peftkit.adapters.oft.cayley", pk.adapters.oft._solved)
    for ours, plain in zip(fused, step(), strict=True):
        close(ours, plain, torch.float64, "a fused product")


def _plainly(self: Delta, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: pk.geometry.Geometry) -> Tensor:
    wx = None if not self.reads_output else y if bias is None else y - g.per_channel(bias)
    return out + self.apply(x, wx, g)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_dense_route_differentiates_as_torch_does(layer: str) -> None:
    """Against W + ΔW in the layer's own function, once and twice."""
    module, x = make(layer)
    pk.wrap(module, "loha", rank=2, route="dense")
    train(module)
    x.requires_grad_()
    wanted = [x, *pk.adapter_parameters(module)]
    slot = module.adaptation.slots[""]

    def plain() -> Tensor:
        weight = routes.changed(module._parameters["weight"], module.deltas(""), slot.geometry)
        return slot.geometry.call(x, weight, module.bias)

    def derivatives(y: Tensor) -> list[Tensor]:
        once = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        return [*once, *torch.autograd.grad(sum(g.square().sum() for g in once), wanted)]

    for a, b in zip(derivatives(module(x)), derivatives(plain()), strict=True):
        close(a, b, torch.float64, "a gradient of the dense route")


def test_two_adapters_that_read_the_output_read_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA and OFT beside a LoRA on one layer: each acts on W·x, not on what the others made of it."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 12).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    pk.wrap(layer, "lora", rank=2, name="one")
    pk.wrap(layer, "dora", rank=2, name="two")
    pk.wrap(layer, "oft", block_size=4, name="three")
    train(layer)
    together = layer(x)
    expected = F.linear(x, layer.weight, layer.bias)
    for name in ("one", "two", "three"):
        with pk.enabled(layer, name):
            expected = expected + layer(x) - F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(together, expected)
