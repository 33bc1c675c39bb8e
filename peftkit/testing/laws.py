"""The laws, as comparisons that an adapter on a small layer must pass: in float64, after its parameters have moved."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.delta import Delta
from peftkit.delta.base import WeightCache
from peftkit.errors import NotAWeightChangeError
from peftkit.files.load import load
from peftkit.files.save import save
from peftkit.geometry import Geometry
from peftkit.kernels.blocks import row_blocks
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.merge import merge, restore
from peftkit.wrapping.strength import set_strength
from peftkit.wrapping.wrap import adapter_parameters, wrap

STRENGTHS = (-1.0, 0.3, 2.0)

#: name -> a layer, and the shape of an input to it
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 12), (2, 3, 8)),
    "Linear without bias": (lambda: nn.Linear(8, 12, bias=False), (3, 8)),
    "Conv2d 1×1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 4)),
    "Conv2d 3×3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 5, 6)),
    "Conv2d in 2 groups": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2), (2, 8, 6, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1), (1, 8, 4, 3)),
}


# -- one adapter on one layer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """An adapter kind with its options, and the layer it is put on."""

    kind: str
    options: dict[str, Any]
    layer: str

    def plain(self) -> tuple[nn.Module, Tensor]:
        """The layer alone and an input, the same each time."""
        make, size = LAYERS[self.layer]
        torch.manual_seed(0)
        return make().double().eval(), torch.randn(size, dtype=torch.float64)

    def wrapped(self, route: str = "auto", *, moved: bool = True) -> tuple[Adapted, Tensor]:
        """The layer with its adapter, which has been trained if `moved`, the same each time."""
        module, x = self.plain()
        wrap(module, self.kind, route=route, **self.options)
        if moved:
            with torch.no_grad():
                for parameter in adapter_parameters(module):
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return cast(Adapted, module.eval()), x


class Comparison(NamedTuple):
    """Two tensors that a law says are equal: to the bit, or to the rounding of the terms both are sums of."""

    law: str
    got: Tensor
    expected: Tensor
    terms: tuple[Tensor, ...] | None = ()  # None: equal to the bit


class Parts(NamedTuple):
    """What a wrapped layer is made of."""

    adapter: Adapter
    W: Tensor
    bias: Tensor | None
    geometry: Geometry


def _routes_of(cell: Cell) -> tuple[str, ...]:
    """The routes to which the adapter can be pinned."""
    adapter, W, _, _ = parts_of(cell.wrapped()[0])
    return ("factored",) if adapter.input_dropout or not adapter(W, 1.0).is_matrix else ("factored", "dense")


def parts_of(module: Adapted) -> Parts:
    """Take a wrapped layer apart."""
    adapter = module.adapter("default", "")
    assert adapter is not None
    bias = cast("Tensor | None", module._parameters["bias"])
    return Parts(adapter, module.base_of("").detach(), bias, module.adapter_state.slots[""].geometry)


# -- the laws ---------------------------------------------------------------------------------------------------------


def _identity(cell: Cell) -> Iterator[Comparison]:
    """A fresh adapter changes no bit of the output."""
    plain, x = cell.plain()
    for route in _routes_of(cell):
        module, _ = cell.wrapped(route, moved=False)
        yield Comparison("identity: output", module(x), plain(x), None)


def _moves(cell: Cell) -> Iterator[Comparison]:
    """The output depends on the parameters: without it, all other laws hold of an adapter that does nothing."""
    (plain, x), (module, _) = cell.plain(), cell.wrapped("factored")
    yield Comparison("training changes the output", module(x).ne(plain(x)).any().double(), torch.ones(()).double())


def _strength(cell: Cell) -> Iterator[Comparison]:
    """The change of the output is λ times that at λ = 1."""
    module, x = cell.wrapped("factored")
    if type(parts_of(module).adapter).at is not Adapter.at:
        return  # the adapter says itself what lies between 0 and 1
    base, whole = cell.plain()[0](x), module(x)
    for strength in STRENGTHS:
        set_strength(module, strength)
        yield Comparison("strength is linear", module(x), base + strength * (whole - base), (base, whole))


def _copies(cell: Cell) -> Iterator[Comparison]:
    """A copy, a pickle and a file give the same output, bit for bit."""
    module, x = cell.wrapped("factored")
    y = module(x)
    yield Comparison("deepcopy", copy.deepcopy(module)(x), y, None)
    yield Comparison("pickle", pickle.loads(pickle.dumps(module))(x), y, None)
    with tempfile.TemporaryDirectory() as folder:
        for portable in (False, True):
            path = save(module, Path(folder) / f"{portable}.safetensors", portable=portable, allow_zero=True)
            fresh, _ = cell.plain()
            load(fresh, path, route="factored")
            yield Comparison("save and load", fresh.eval()(x), y, None)


def _no_matrix(cell: Cell) -> Iterator[Comparison]:
    """Merging a change that depends on the input raises NotAWeightChangeError."""
    module, _ = cell.wrapped()
    try:
        merge(module)
    except NotAWeightChangeError:
        refused = 1.0
    else:
        refused = 0.0
    yield Comparison("merge is refused", torch.tensor(refused), torch.ones(()))


def _methods(cell: Cell) -> Iterator[Comparison]:
    """What each method of ΔW returns is what `dense` says."""
    adapter, W, _, _ = parts_of(cell.wrapped()[0])
    with torch.no_grad():
        delta = adapter(W, 1.0)
        dense = delta.dense()
        yield Comparison("shape", torch.tensor(delta.shape), torch.tensor(W.shape), None)
        yield Comparison("dense", dense, dense.to(delta.dtype).reshape(W.shape), None)
        yield Comparison("added_to", delta.added_to(W, 0.3), W + 0.3 * dense, (W,))
        yield from _row_blocks(delta, dense, W)
        M = torch.randn_like(W)
        for other in (M, W):
            yield from _products(delta, dense, other)
        excess = dense.abs().max() - delta.max_abs_bound(W.abs().max())
        yield Comparison("max_abs_bound", excess.clamp(min=0), torch.zeros_like(excess), (W,))
        for strength in STRENGTHS:
            if type(adapter).at is Adapter.at:
                for given in (strength, torch.tensor(strength, dtype=W.dtype)):
                    yield Comparison("scaled", delta.scaled(given).dense(), strength * dense, (W,))
        yield Comparison("upcast", delta.upcast().dense(), dense, (W,))
        yield Comparison("mapped", delta.mapped(lambda _, factor: factor).dense(), dense, None)
        yield Comparison("folded", delta.folded().dense(), dense, (W,))
        B, A = delta.low_rank_factors()
        yield Comparison("low_rank_factors", B @ A, dense, (W,))
        f = torch.linspace(0.5, 2, len(W), dtype=W.dtype)
        rescaled = delta.rows_rescaled(f)
        if rescaled is not None:
            yield Comparison("rows_rescaled", rescaled.dense(), f[:, None] * dense, (W,))


def _row_blocks(delta: Delta, dense: Tensor, W: Tensor) -> Iterator[Comparison]:
    """Blocks of rows."""
    m, n = dense.shape
    some = slice(1, n, 2)
    for block in row_blocks(m, n, delta.row_multiple, 1):
        expected = dense[block]
        yield Comparison("rows", delta.rows(block), expected, (W,))
        written, added = torch.full_like(expected, math.nan), W[block].clone()
        delta.rows_(block, written)
        yield Comparison("rows_", written, expected, (W,))
        delta.add_rows_(block, added)
        yield Comparison("add_rows_", added, W[block] + expected, (W,))
        yield Comparison("tile", delta.tile(block, some), expected[:, some], (W,))
    yield Comparison("dense_blockwise", delta.dense_blockwise(), dense, (W,))


def _products(delta: Delta, dense: Tensor, M: Tensor) -> Iterator[Comparison]:
    """Inner products and norms."""
    size = dense.norm() * M.norm() + dense.square().sum()  # what cancels in them
    product, square = dense * M, dense.square()
    yield Comparison("inner", delta.inner(M), product.sum(), (size,))
    yield Comparison("sqnorm", delta.sqnorm(), square.sum(), (size,))
    if delta.cheap_sqnorm is not None:
        yield Comparison("cheap_sqnorm", delta.cheap_sqnorm, square.sum(), (size,))
    for law, got, axis in (("moments", delta.moments(M), 1), ("column_moments", delta.column_moments(M), 0)):
        yield Comparison(law, got[0], product.sum(axis), (size,))
        yield Comparison(law, got[1], square.sum(axis), (size,))


def _of_the_base(cell: Cell) -> Iterator[Comparison]:
    """<ΔW, W> and ‖ΔW‖², as the monitor asks for them: with nothing known of W, and with all that is."""
    adapter, W, _, _ = parts_of(cell.wrapped()[0])
    with torch.no_grad():
        delta, cache = adapter(W, 1.0), WeightCache()
        dense = delta.dense()
        size = dense.norm() * W.norm() + dense.square().sum()
        own = WeightCache()
        for ask in (lambda: delta.inner_and_sqnorm(W, cache), lambda: adapter.inner_and_sqnorm(W, own)) * 2:
            inner, square = ask()
            yield Comparison("inner_and_sqnorm", inner, (dense * W).sum(), (size,))
            yield Comparison("inner_and_sqnorm", square, dense.square().sum(), (size,))


def _products_with_x(cell: Cell) -> Iterator[Comparison]:
    """ΔW·x, alone and added to an output with a bias."""
    module, x = cell.wrapped()
    adapter, W, bias, g = parts_of(module)
    with torch.no_grad():
        delta = adapter(W, 1.0)
        wx, expected, y = g.run(x, W), g.run(x, delta.dense()), g.call(x, g.weight(W), bias)
        yield Comparison("apply", delta.apply(x, wx if delta.reads_output else None, g), expected, (wx,))
        yield Comparison("apply_onto", delta.apply_onto(y.clone(), x, y, bias, g), y + expected, (wx, y))


def _routes(cell: Cell) -> Iterator[Comparison]:
    """The factored and the dense route give the output of W + λ·ΔW, and so does the merged weight."""
    for route in _routes_of(cell):
        module, x = cell.wrapped(route)
        adapter, W, bias, g = parts_of(module)
        for strength in STRENGTHS:
            set_strength(module, strength)
            dense = adapter(W, strength).dense()
            y, terms = module(x), (g.run(x, W), g.run(x, dense))
            yield Comparison(f"{route} route", y, g.call(x, g.weight(W + dense), bias), terms)
            merge(module)
            yield Comparison("forward = merged", module(x), y, terms)
            restore(module)


def _gradients(cell: Cell) -> Iterator[Comparison]:
    """The gradients are those of a layer whose weight is W + ΔW."""
    for route in _routes_of(cell):
        module, x = cell.wrapped(route)
        adapter, W, bias, g = parts_of(module)
        x.requires_grad_(True)
        inputs = [x, *adapter_parameters(module)]
        y = module(x)
        upstream = torch.randn_like(y)
        dense = g.call(x, g.weight(W + adapter(W, 1.0).dense()), bias)
        got, expected = (
            torch.autograd.grad(output, inputs, upstream, allow_unused=True, materialize_grads=True)
            for output in (y, dense)
        )
        for own, other in zip(got, expected, strict=True):  # some are differences of numbers as large as the largest
            yield Comparison(f"gradients, {route}", own, other, expected)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int64)


def _merging(cell: Cell) -> Iterator[Comparison]:
    """Merging a fresh adapter, and merging and restoring any, changes no bit of the weight."""
    before = cell.plain()[0].get_parameter("weight")
    module, _ = cell.wrapped(moved=False)
    weight = module.get_parameter("weight")
    merge(module)
    yield Comparison("identity: weight", _bits(weight), _bits(before), None)
    for backup in ("copy", "packed"):
        module, _ = cell.wrapped()
        weight = module.get_parameter("weight")
        merge(module, backup=backup)
        restore(module)
        yield Comparison("merge and restore", _bits(weight), _bits(before), None)


def laws_for(cell: Cell) -> tuple[Callable[[Cell], Iterator[Comparison]], ...]:
    """The laws that have a meaning for the adapter: more of them where its change is a matrix ΔW."""
    adapter, W, _, _ = parts_of(cell.wrapped()[0])
    of_a_matrix = (_methods, _of_the_base, _products_with_x, _routes, _gradients, _merging)
    return (_identity, _moves, _strength, *(of_a_matrix if adapter(W, 1.0).is_matrix else (_no_matrix,)), _copies)
