"""The fused products: the same numbers as their definitions, once and twice differentiated, in every memory format."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

import peftkit as pk
from peftkit.adapters import cayley
from peftkit.bench.step import kept
from peftkit.delta import Hadamard
from peftkit.kernels import fused, outputs
from peftkit.wrapping import layer as layer_module
from peftkit.wrapping import routes
from tests.support.laws import agree as agree_to_rounding
from tests.support.zoo import ADAPTERS, LAYERS, make, train

#: an activation with 12 channels by its shape, its spatial dimensions and how its memory is laid out
ACTIVATIONS: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor], Tensor]]] = {
    "rows": ((5, 12), 0, lambda t: t),
    "a vector": ((12,), 0, lambda t: t),
    "tokens": ((2, 3, 12), 0, lambda t: t),
    "columns": ((5, 12), 0, lambda t: t.mT.contiguous().mT),
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
    """Values and first and second derivatives."""
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

    agree(lambda out, h, B: fused.add_pointwise_(out.clone(), h, B, spatial), plain, [out, h, B])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_add_pairs(name: str) -> None:
    (out, spatial), (h, _) = drawn(name), drawn(name, 4)

    def plain(out: Tensor, h: Tensor, F: Tensor, G: Tensor) -> Tensor:
        return fused.add_pointwise_(out * 1, h, fused.khatri_rao(F, G, 1), spatial)

    def quick(out: Tensor, h: Tensor, F: Tensor, G: Tensor) -> Tensor:
        return fused.add_pairs_(out * 1, h, F, G, spatial)

    agree(quick, plain, [out, h, parameter(12, 2), parameter(12, 2)])


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(4, 6), (4,)),
        (nn.Linear(4, 6), (2, 3, 4)),
        (nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 5, 4)),
        (nn.Conv2d(4, 5, 3, dilation=2, padding=2), (4, 5, 4)),
        (nn.Conv2d(4, 5, 3, padding="same"), (2, 4, 3, 3)),
        (nn.Conv2d(4, 5, 1), (2, 4, 3, 2)),
        (nn.Conv2d(4, 5, 1, padding=1), (2, 4, 3, 2)),
        (nn.Conv2d(4, 5, 1).to(memory_format=torch.channels_last), (2, 4, 3, 2)),
        (nn.Conv1d(4, 5, 1), (4, 5)),
        (nn.ConvTranspose2d(4, 5, 2, stride=2), (2, 4, 2, 3)),
    ],
)
def test_pairs_are_contracted_as_one_product(layer: nn.Module, size: tuple[int, ...]) -> None:
    """LoHa's ΔW·x with its pairs made again in backward, against the pairs multiplied out."""
    layer, g = copy.deepcopy(layer).double().requires_grad_(False), pk.geometry.of(layer)
    m, n = g.shape.rows, g.shape.columns
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    factors = [parameter(m, 3), parameter(3, n), parameter(m, 3), parameter(3, n)]

    def plain(x: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensor:
        return layer(x) + g.run(x, (B1 @ A1) * (B2 @ A2))

    def quick(x: Tensor, *factors: Tensor) -> Tensor:
        y = layer(x)
        return Hadamard(*factors).apply_onto(y, x, y, layer.bias, g)

    agree(quick, plain, [x, *factors])
    for some in ([x], factors):  # what is asked for alone
        ours, theirs = (torch.autograd.grad(f(x, *factors).square().sum(), some) for f in (quick, plain))
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (f(x.detach(), *factors).square().sum() for f in (quick, plain))
    torch.testing.assert_close(*(torch.autograd.grad(y, factors) for y in (ours, theirs)))


def test_the_gradient_of_an_adapted_layers_input_is_nobody_elses() -> None:
    """Backward writes over no gradient that a hook was shown."""
    layer = nn.Linear(4, 4)
    pk.wrap(layer, "lora", rank=2)
    train(layer)
    seen: list[Tensor] = []
    layer.register_full_backward_hook(lambda module, gx, gy: seen.extend((gx[0], gy[0])))
    x = torch.randn(3, 4, requires_grad=True)
    between = x * 1
    between.register_hook(seen.append)
    y = layer(between)
    y.register_hook(seen.append)
    g = torch.randn(3, 4)
    (gx,) = torch.autograd.grad(y + 0 * between, x, g)
    W = layer.weight + layer.adapters["default"].delta(layer.weight).dense()
    torch.testing.assert_close(gx, g @ W)
    by_y, of_module, by_module, total = seen
    torch.testing.assert_close(by_y, g)
    torch.testing.assert_close(by_module, g)
    torch.testing.assert_close(of_module, g @ W)
    torch.testing.assert_close(total, g @ W)


@pytest.mark.parametrize("module", [nn.Linear(64, 96), nn.Conv2d(64, 96, 3, padding=1)])
def test_pairs_do_not_wait_for_backward(module: nn.Module) -> None:
    module = copy.deepcopy(module)
    pk.wrap(module, "loha", rank=4, route="factored")
    x = torch.randn((2, 64) if isinstance(module, nn.Linear) else (1, 64, 2, 2))
    positions = x.numel() // 64
    assert kept(module, x) == 4 * 16 * positions, "more than the 16 channels between the factors is kept, in fp32"


def test_constant_factors_keep_no_input() -> None:
    """Backward of a frozen Linear does not read its input, nor does that of LoLDU's constant factors."""
    layer = nn.Linear(8, 6).requires_grad_(False)
    pk.wrap(layer, "loldu", rank=4, route="factored")
    x = torch.randn(5, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()), lambda _: x):
        layer(x).sum()
    assert kept and x.untyped_storage().data_ptr() not in kept


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rotated(name: str, bias: bool) -> None:
    y, spatial = drawn(name)
    K = parameter(3, 4, 4)

    def plain(y: Tensor, K: Tensor, *b: Tensor) -> Tensor:
        wx = y - channels(b[0], spatial) if b else y
        rows = wx.movedim(-1 - spatial, -1) @ torch.block_diag(*K).mT
        return y + rows.movedim(-1, -1 - spatial)

    fused: Callable[..., Tensor] = lambda y, K, *b: outputs.rotated(y, K, b[0] if b else None, spatial)  # noqa: E731
    agree(fused, plain, [y, K, parameter(12)] if bias else [y, K])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rescaled(name: str, bias: bool) -> None:
    y, spatial = drawn(name)

    def plain(y: Tensor, e: Tensor, *b: Tensor) -> Tensor:
        return y + channels(e, spatial) * (y - channels(b[0], spatial) if b else y)

    fused: Callable[..., Tensor] = lambda y, e, *b: outputs.rescaled(y, e, b[0] if b else None, spatial)  # noqa: E731
    agree(fused, plain, [y, parameter(12), parameter(12)] if bias else [y, parameter(12)])


#: what comes after a layer and writes over its output
WRITERS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": F.relu_,
    "+=": lambda y: y.add_(1.0).square(),
    "nobody": lambda y: y.sigmoid(),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("around", ["alone", "checkpointed", "offloaded"])
@pytest.mark.parametrize("kind", ["dora", "oft"])
@pytest.mark.parametrize("size", [(3, 8), (2, 8, 4, 4), (8, 4, 4)])
def test_an_output_that_is_written_over_is_made_again(
    kind: str, writer: str, around: str, size: tuple[int, ...]
) -> None:
    layer = nn.Linear(8, 12) if len(size) == 2 else nn.Conv2d(8, 12, 3, padding=1)
    pk.wrap(layer.double(), kind, route="factored")
    train(layer)
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    wanted = [x, *pk.adapter_parameters(layer)]

    def after(x: Tensor) -> Tensor:
        return WRITERS[writer](layer(x))

    expected = torch.autograd.grad(WRITERS[writer](layer(x) * 1).square().sum(), wanted)
    if around == "checkpointed":
        y = checkpoint(after, x, use_reentrant=False)
    elif around == "offloaded":
        with torch.autograd.graph.save_on_cpu():
            y = after(x)
    else:
        y = after(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), wanted, retain_graph=True), expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), wanted), expected)


def test_one_output_is_kept() -> None:
    """DoRA keeps W·x beside what the next operation keeps, its input."""
    layer = nn.Linear(64, 96)
    pk.wrap(layer, "dora", rank=4)
    x = torch.randn(128, 64, requires_grad=True)
    assert 2 <= kept(nn.Sequential(layer, nn.GELU()), x) / (4 * 128 * 96) < 2.5


@pytest.mark.parametrize("frozen", ["nothing", "magnitude", "down", "everything"])
def test_no_output_outlives_its_backward(frozen: str) -> None:
    """Also where the graph does, as in a loop that holds its last loss."""
    layer = nn.Linear(64, 96)
    pk.wrap(layer, "dora", rank=4)
    for name, parameter in layer.adapters.named_parameters():
        parameter.requires_grad_(frozen != "everything" and not name.endswith(frozen))
    out = layer(torch.randn(8, 64, requires_grad=True))
    alive, loss = TensorWeakRef(out), out.sum()
    del out
    loss.backward()
    assert alive() is None


@pytest.mark.parametrize("kind", ["dora", "oft", "lora"])
def test_an_input_that_is_written_over(kind: str) -> None:
    """OFT reads no input in backward; where the factors are frozen, nobody does."""
    layer = nn.Linear(12, 12).double()
    pk.wrap(layer, kind, route="factored")
    train(layer)
    for name, parameter in layer.adapters.named_parameters():
        parameter.requires_grad_(not name.endswith("down"))
    start = torch.randn(12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 12, dtype=torch.float64)
    wanted = [start, *(p for p in layer.adapters.parameters() if p.requires_grad)]
    h = x + start
    expected = torch.autograd.grad((h + layer(h)).square().sum(), wanted)
    h = x + start
    h += layer(h)
    torch.testing.assert_close(torch.autograd.grad(h.square().sum(), wanted), expected)


def test_the_layer_has_no_dropout_when_it_is_called_again() -> None:
    layer = nn.Linear(8, 12).double()
    pk.wrap(layer, "dora", rank=2, dropout=0.5, route="factored")
    train(layer)
    x, wanted = torch.randn(5, 8, dtype=torch.float64), list(pk.adapter_parameters(layer))
    found = []
    for after in (lambda y: y.relu(), lambda y: y.relu_()):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(after(layer(x)).square().sum(), wanted))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_a_tracer_sees_operations(kind: str) -> None:
    layer = nn.Linear(8, 12)
    pk.wrap(layer, kind, route="factored")
    train(layer)
    x = torch.randn(5, 8)
    torch.testing.assert_close(make_fx(lambda x: layer(x))(x)(2 * x), layer(2 * x))


def test_a_magnitude_of_zero_has_a_gradient() -> None:
    layer = nn.Linear(8, 12).double()
    pk.wrap(layer, "dora", rank=2, route="factored")
    train(layer)
    magnitude = layer.adapters["default"].magnitude
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = torch.autograd.grad(layer(x).sum(), magnitude)
    with torch.no_grad():
        magnitude[3] = 0.0
    # the output is linear in every magnitude, so the gradient of none depends on it
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), magnitude), expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("layer", ["linear", "conv2d k3", "conv2d channels last", "conv2d k1 g2", "transposed2d"])
def test_the_fused_route_is_the_plain_one(adapter: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient, with the fused products and without."""
    module, x = make(layer)
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
    monkeypatch.setattr(layer_module, "eager", lambda: False)
    monkeypatch.setattr(cayley, "eager", lambda: False)
    for ours, plain in zip(fused, step(), strict=True):
        agree_to_rounding(ours, plain, torch.float64, "a fused product")


@pytest.mark.parametrize("kind", ["loha", "dora"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_dense_route_differentiates_as_torch_does(layer: str, kind: str) -> None:
    """Against W + ΔW in the layer's own function, once and twice."""
    module, x = make(layer)
    pk.wrap(module, kind, rank=2, route="dense")
    train(module)
    x.requires_grad_()
    wanted = [x, *pk.adapter_parameters(module)]
    slot = module.adapter_state.slots[""]

    def plain() -> Tensor:
        weight = routes.changed(module._parameters["weight"], module.deltas(""), slot.geometry)
        return slot.geometry.call(x, weight, module.bias)

    torch.testing.assert_close(
        torch.autograd.grad(module(x).pow(3).sum(), wanted),
        torch.autograd.grad(module(x).pow(3).sum(), wanted, create_graph=True),
    )

    def derivatives(y: Tensor) -> list[Tensor]:
        once = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        return [*once, *torch.autograd.grad(sum(g.square().sum() for g in once), wanted)]

    for a, b in zip(derivatives(module(x)), derivatives(plain()), strict=True):
        agree_to_rounding(a, b, torch.float64, "a gradient of the dense route")


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Linear(6, 4), (2, 3, 6)),
        (nn.Linear(6, 4), (6,)),
        (nn.Linear(6, 4), (0, 3, 6)),
        (nn.Conv2d(6, 4, 3), (6, 5, 5)),
        (nn.Conv1d(6, 4, 3, padding=1), (0, 6, 5)),
    ],
)
def test_the_dense_route_may_be_written_over(module: nn.Module, size: tuple[int, ...]) -> None:
    module = copy.deepcopy(module).double()
    pk.wrap(module, "loha", rank=2, route="dense")
    train(module)
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    wanted = [x, *pk.adapter_parameters(module)]
    found = [torch.autograd.grad(f(module(x)).sum(), wanted) for f in (torch.relu, torch.relu_)]
    torch.testing.assert_close(*found)


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
