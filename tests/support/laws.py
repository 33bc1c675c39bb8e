"""The laws, as functions of (adapter, layer): each returns if it holds, raises AssertionError if it does not.

Bounds are relative, 1e-12 in float64 and a small multiple of the rounding in a narrower dtype. Relative to what is
said where it is used: a sum W·x + ΔW·x is known to the rounding of its terms, which may be larger than itself.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import DoRA
from peftkit.delta import Decomposed, Delta
from peftkit.delta.base import WeightCache
from peftkit.errors import OptionError, UnsupportedLayerError
from peftkit.geometry import Geometry
from peftkit.wrapping.installed import installed_adapters
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.lookup import Lookup
from tests.support import numbers
from tests.support.zoo import CASES, is_norm, make, target_of, train

#: what a cell that has no meaning raises, at wrap
REFUSALS = (OptionError, UnsupportedLayerError)

#: unit roundoff times a small constant: two ways to form the same sum of a few hundred terms
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

STRENGTHS = (-1.0, 0.0, 0.3, 1.0, 2.0)


def wrapped(adapter: str, layer: str, dtype: torch.dtype = torch.float64, **kwargs: str) -> tuple[nn.Module, Tensor]:
    """A trained cell and an input: copies, as a cell takes ten times as long to make and several laws ask for it."""
    return copy.deepcopy(_wrapped(adapter, layer, dtype, **kwargs))


@functools.lru_cache(maxsize=16)  # of one cell, as all its laws come one after the other
def _wrapped(adapter: str, layer: str, dtype: torch.dtype, **kwargs: str) -> tuple[nn.Module, Tensor]:
    module, x = make(layer, dtype)
    case = CASES[adapter]
    pk.wrap(module, case.kind, targets=target_of(module), **case.options, **kwargs)
    train(module)
    return module, x


def the_delta(module: nn.Module, name: str = "default", strength: float = 1.0) -> tuple[Delta, Tensor]:
    """ΔW of the module's adapter, and W."""
    assert isinstance(module, Adapted)
    slot_name, slot = next(iter(module.adapter_state.slots.items()))  # its matrix, before its bias
    W = slot.geometry.matrix(own_weight(module).detach())
    adapter = module.adapter(name, slot_name)
    assert adapter is not None
    return adapter(W, strength), W


def own_weight(module: nn.Module) -> Tensor:
    """The weight itself, without what adapters add where it is read."""
    own = module._parameters
    weight = own["weight"] if "weight" in own else next(iter(own.values()))  # of a recurrent layer, the first
    assert weight is not None
    return weight


def geometry_of(module: nn.Module) -> Geometry:
    """How the module's weight is read as a matrix."""
    assert isinstance(module, Adapted)
    slot = next(iter(module.adapter_state.slots.values()))
    return slot.geometry


def agree(a: Tensor, b: Tensor, dtype: torch.dtype, what: str, *terms: Tensor) -> None:
    """a is b to the bound of its dtype, the terms being what b is a sum of."""
    numbers.close(a, b, BOUND[dtype], what, *terms)


def terms(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What the output is a sum of: the base's, and for t·(W + V) − W also its two large parts."""
    with pk.disabled(module):
        parts = [module(x)]
    for name in module.adapters:
        delta, W = the_delta(module, name)
        if isinstance(delta, Decomposed):
            g = geometry_of(module)
            e, f = (v if delta.columns else v[:, None] for v in (delta.e, delta.f))
            parts += [g.run(x, e * W), g.run(x, f * delta.V.dense())]
    return [part.detach() for part in parts]


def second_of(module: nn.Module) -> dict[str, Any]:
    """Another adapter for a layer: LoRA, or what a vector can have."""
    return {"kind": "full"} if is_norm(module) else {"kind": "lora", "rank": 1}


def bits(tensor: Tensor) -> bytes:
    row_by_row = tensor.detach().clone(memory_format=torch.contiguous_format)
    return row_by_row.reshape(-1).view(torch.uint8).numpy().tobytes()


def identity_at_start(adapter: str, layer: str, dtype: torch.dtype = torch.float64) -> None:
    """1. A fresh adapter changes neither the output nor, merged, the weight, bit for bit; on both routes."""
    module, x = make(layer, dtype)
    before, weight = module(x), bits(own_weight(module))
    case = CASES[adapter]
    for route in ("factored", "dense"):
        pk.wrap(module, case.kind, targets=target_of(module), route=route, **case.options)
        assert torch.equal(module(x), before), f"{route}: the output changed"
        delta, _ = the_delta(module)
        assert not delta.dense().any(), "ΔW is not zero"
        pk.merge(module)
        assert bits(own_weight(module)) == weight, "merged: the weight changed"
        pk.restore(module)
        pk.unwrap(module)


def routes_agree(adapter: str, layer: str, dtype: torch.dtype = torch.float64) -> None:
    """2. The factored and the dense route give the same output and the same gradients."""
    results = []
    for route in ("factored", "dense"):
        module, x = wrapped(adapter, layer, dtype, route=route)
        inputs = [x.requires_grad_(True)] if x.is_floating_point() else []  # numbers of rows have no gradient
        with pk.disabled(module):
            base = module(x)
        y = module(x)
        if not results:  # an upstream gradient along what the adapter did: its sums over positions do not cancel
            weights, parts = (y - base).detach(), terms(module, x)
        parameters = pk.adapter_parameters(module)
        gradients = torch.autograd.grad((y * weights).sum(), [*inputs, *parameters])
        through_base = torch.autograd.grad((base * weights).sum(), inputs) if inputs else ()
        held_by = module.adapters["default"]
        own = next(iter(held_by.values())) if isinstance(held_by, nn.ModuleDict) else held_by
        held: list[Tensor] = []
        delta, _ = the_delta(module)
        if isinstance(own, DoRA) and not own.detach_norm and isinstance(delta, Decomposed):
            own.detach_norm = True  # its gradient is a difference from that at a held norm
            held = list(torch.autograd.grad((module(x) * weights).sum(), parameters))
            worst = delta.f.abs().max()  # and t, which grows as W + V vanishes, multiplies it once more
            held = [worst * gradient for gradient in held]
        results.append((y.detach(), *gradients))
    names = ["output", *("x" for _ in inputs), *(n for n, p in module.named_parameters() if p.requires_grad)]
    for name, a, b in zip(names, *results, strict=True):
        # Of the parameters' gradients the largest counts: some are differences of near-equals
        summed = {"output": parts, "x": through_base}.get(name, [*results[1][1 + len(inputs) :], *held])
        agree(a, b, dtype, name, *summed)


def forward_is_merged(adapter: str, layer: str, dtype: torch.dtype = torch.float64) -> None:
    """3. forward(λ) == merged(λ); at λ = 0 both are the base, bit for bit; on both routes."""
    for route in ("factored", "dense"):
        module, x = wrapped(adapter, layer, dtype, route=route)
        parts = terms(module, x)
        weight = bits(own_weight(module))
        for strength in STRENGTHS:
            pk.set_strength(module, strength)
            y = module(x)
            pk.merge(module)
            merged = module(x)
            if strength == 0:
                assert torch.equal(y, parts[0]), "forward(0) is not the base"
                assert bits(own_weight(module)) == weight, "merged(0) is not the base"
            else:
                agree(y, merged, dtype, f"{route} λ={strength}", *parts)
                assert not torch.equal(merged, parts[0]), "the merge changed nothing"
            pk.restore(module)


def restore_is_exact(adapter: str, layer: str, dtype: torch.dtype = torch.float32, cycles: int = 3) -> None:
    """4. merge + restore returns every bit, cycle after cycle, whatever subset was merged, in both modes."""
    module, x = wrapped(adapter, layer, dtype)
    pk.wrap(module, targets=target_of(module), name="second", **second_of(module))
    train(module, seed=5, name="second")
    weight, output = bits(own_weight(module)), module(x)
    parts = terms(module, x)
    subsets = (None, "default", "second", ["second", "default"])
    for cycle in range(cycles):
        pk.merge(module, subsets[cycle % 4], backup=("copy", "packed")[cycle % 2])
        assert bits(own_weight(module)) != weight, "the merge changed nothing"
        if cycle < 4:
            agree(module(x), output, dtype, f"output with {subsets[cycle % 4]} merged", *parts)
        pk.restore(module)
        assert bits(own_weight(module)) == weight, f"cycle {cycle}: bits differ"
    assert torch.equal(module(x), output)


def copies_are_equal(adapter: str, layer: str, dtype: torch.dtype = torch.float32) -> None:
    """5. save → load, state dict, deepcopy and pickle give the same function, bit for bit."""
    module, x = _wrapped.__wrapped__(adapter, layer, dtype)  # itself, and no copy
    expected = module(x)
    with tempfile.TemporaryDirectory() as folder:
        for portable in (False, True):
            path = pk.save(module, Path(folder) / f"{portable}.safetensors", portable=portable)
            fresh, _ = make(layer, dtype)
            pk.load(fresh, path)
            assert torch.equal(fresh(x), expected), f"save → load, portable={portable}"
    fresh, _ = make(layer, dtype)
    case = CASES[adapter]
    pk.wrap(fresh, case.kind, targets=target_of(fresh), **case.options)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), expected), "state dict"
    assert torch.equal(copy.deepcopy(module)(x), expected), "deepcopy"
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected), "pickle"


def algebra_is_dense(adapter: str, layer: str, dtype: torch.dtype = torch.float64) -> None:
    """6. Every closed form equals the default derived from `dense`."""
    module, x = wrapped(adapter, layer, dtype)
    delta, W = the_delta(module, strength=0.7)
    assert isinstance(module, Adapted)
    g = geometry_of(module)
    dense = delta.dense()
    assert delta.shape == dense.shape == W.shape
    assert delta.dtype == dense.dtype
    M = torch.randn(W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(W.dtype)
    for other in (M, W):
        size = dense.norm() * other.norm()  # what cancels in an inner product
        agree(delta.inner(other), Delta.inner(delta, other), dtype, "inner", size)
        for own, default in (("moments", Delta.moments), ("column_moments", Delta.column_moments)):
            for value, expected in zip(getattr(delta, own)(other), default(delta, other), strict=True):
                agree(value, expected, dtype, own, size)
    agree(delta.sqnorm(), Delta.sqnorm(delta), dtype, "sqnorm")
    own, _ = the_delta(module)  # the monitor's two numbers, with and without what is already known of W
    full, known, cache = own.dense(), WeightCache(), WeightCache()
    held = next(installed_adapters(module)).adapter
    for _ in range(2):
        for inner, square in (own.inner_and_sqnorm(W, known), held.inner_and_sqnorm(W, cache)):
            agree(inner, (full * W).sum(), dtype, "alignment", full.norm() * W.norm())
            agree(square, full.square().sum(), dtype, "alignment")
    step = delta.row_multiple
    for start in range(0, W.shape[0], step):
        block = slice(start, start + step)
        agree(delta.rows(block), dense[block], dtype, "rows", dense)
        with torch.no_grad():
            written = torch.full_like(dense[block], float("nan"))
            delta.rows_(block, written)
            added = W[block].clone()
            delta.add_rows_(block, added)
        agree(written, dense[block], dtype, "rows_", dense)
        agree(added, W[block] + dense[block], dtype, "add_rows_", W)
    quick, largest = delta.cheap_sqnorm, delta.max_abs_bound(W.abs().max())
    assert largest >= dense.abs().max() * (1 - BOUND[dtype]), "an element of ΔW is larger than the bound on them"
    if quick is not None:
        agree(quick, Delta.sqnorm(delta), dtype, "quick_sqnorm")
    agree(delta.scaled(-0.5).dense(), -0.5 * dense, dtype, "scaled")
    if isinstance(g, Lookup):
        agree(delta.lookup(x), dense[x], dtype, "lookup", dense)
        return
    if g.vector:  # no layer runs it
        return
    wx = g.run(x, W)
    agree(delta.apply(x, wx, g), Delta.apply(delta, x, wx, g), dtype, "apply")


def merge_rounds_once(adapter: str, layer: str) -> None:
    """8. A 16-bit merge is the fp32 sum, rounded once, bit for bit."""
    for dtype in (torch.bfloat16, torch.float16):
        _rounds_once(adapter, layer, dtype)


def _rounds_once(adapter: str, layer: str, dtype: torch.dtype) -> None:
    module, _ = wrapped(adapter, layer, dtype)
    pk.wrap(module, targets=target_of(module), name="second", **second_of(module))
    train(module, seed=5, name="second")
    pk.set_strength(module, 0.3, "second")
    assert isinstance(module, Adapted)
    g = geometry_of(module)
    first, W = the_delta(module)
    second, _ = the_delta(module, "second", 0.3)
    W = W.clone()
    expected = g.weight((W.float() + (first.dense() + second.dense())).to(dtype))
    report = pk.merge(module)
    assert torch.equal(own_weight(module), expected)
    moved = (own_weight(module).float() - g.weight(W).float()).norm().item()
    pk.restore(module)
    assert abs(report.weights[0].change - moved) <= 1e-5 * moved, "the report's change is not the change"


def gradients_check(adapter: str, layer: str, dtype: torch.dtype = torch.float64) -> None:
    """9. gradcheck of the output with respect to the input and every adapter parameter, on both routes.

    Where the algorithm holds a norm constant in its gradient by definition, only the input is checked. Where the layer
    by definition has another gradient than its numbers say (of padding, by frequency), nothing is.
    """
    if layer == "embedding scaled":
        return
    detached = "dora" in adapter and CASES[adapter].options.get("detach_norm", True)
    for route in ("factored", "dense"):
        module, x = wrapped(adapter, layer, dtype, route=route)
        names = [] if detached else [n for n, p in module.named_parameters() if p.requires_grad]
        values = [module.get_parameter(n).detach().clone().requires_grad_() for n in names]

        def f(x: Tensor, *parameters: Tensor) -> Tensor:
            return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))  # noqa: B023

        if x.is_floating_point():
            x.requires_grad_(True)
        if x.requires_grad or values:
            assert torch.autograd.gradcheck(f, (x, *values), fast_mode=True)


def eval_is_deterministic(adapter: str, layer: str, dtype: torch.dtype = torch.float32) -> None:
    """10. In eval mode the output is a function of the input, and drawing it consumes no randomness."""
    module, x = wrapped(adapter, layer, dtype)
    module.eval()
    state = torch.get_rng_state()
    first = module(x)
    torch.manual_seed(123)
    assert torch.equal(module(x), first)
    torch.set_rng_state(state)
    module(x)
    assert torch.equal(torch.get_rng_state(), state)


LAWS: dict[str, Callable[..., None]] = {
    "1 identity at start": identity_at_start,
    "2 routes agree": routes_agree,
    "3 forward = merged": forward_is_merged,
    "4 restore is exact": restore_is_exact,
    "5 copies are equal": copies_are_equal,
    "6 algebra is dense": algebra_is_dense,
    "8 one rounding": merge_rounds_once,
    "9 gradcheck": gradients_check,
    "10 eval deterministic": eval_is_deterministic,
}


@functools.cache
def refusal(adapter: str, layer: str) -> str | None:
    """11. The typed reason why a cell has no meaning, raised at wrap with the layer untouched; None if it has one."""
    module, _ = make(layer)
    case = CASES[adapter]
    before = type(module), {k: bits(v) for k, v in module.state_dict().items()}
    try:
        pk.wrap(module, case.kind, targets=target_of(module), **case.options)
    except REFUSALS as error:
        after = type(module), {k: bits(v) for k, v in module.state_dict().items()}
        assert before == after, "a refused wrap changed the layer"
        assert all(p.requires_grad for p in module.parameters()), "a refused wrap froze the layer"
        return str(error)
    return None
