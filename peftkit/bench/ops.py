"""One operation on one weight: building ΔW, adding it, watching it, or making the adapter, over a floor.

The floor of an operation is writing its result into fresh memory, plus its multiplications at the speed of a large
product of matrices. Floor and operation are measured in the same rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkit.adapters import registry
from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import KINDS, adapted, ways
from peftkit.bench.rows import Row
from peftkit.bench.step import TOLERANCE
from peftkit.bench.timing import Call, Spread, contest, peak_bytes, ratios, require_accurate
from peftkit.delta.addition import add_
from peftkit.delta.base import WeightCache
from peftkit.geometry import of
from peftkit.wrapping.installed import installed_adapters

OPERATIONS = ("dense", "add", "watch", "make")
_PRODUCT = 768  # the side of the matrices whose product gives the speed of multiplication


def measure(
    operation: str,
    shape: LayerShape,
    kind: str,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    peers: list[str],
    rounds: int = 11,
) -> Row:
    """Time an operation, ours and the peers', over its floor.

    Args:
        operation: one of `OPERATIONS`.
        shape: the layer.
        kind: one of `peers.KINDS`.
        dtype: of weight and factors.
        device: "cpu" or "cuda".
        peers: of "lycoris" and "peft".
        rounds: turns of every way.

    Raises:
        BenchError: our ΔW is wrong; nothing was timed.
    """
    torch.manual_seed(0)
    layer = shape.layer(dtype, device)
    models = {way: adapted(way, kind, layer).to(dtype) for way in ways(peers, kind)}
    here = next(installed_adapters(models["ours"]))
    with torch.no_grad():
        delta = here.adapter.delta(here.base)
        wrong = _error(here.adapter, here.base, delta.dense())
        require_accurate(f"ΔW of {kind} on {shape} in {dtype}", wrong, TOLERANCE[dtype])
        calls = {"ours": _ours(operation, here.adapter, layer, kind)}
        calls |= {way: call for way, model in models.items() if (call := _theirs(operation, way, kind, model))}
        flops = 0 if operation in ("make", "watch") else delta.dense_flops()
        # What is solved for, as in OFT, is kept in more bits than the parameters, and so is the ΔW that it gives
        result = delta.dtype if operation == "dense" else dtype
        a = torch.randn(_PRODUCT, _PRODUCT, dtype=result, device=device)
        timed: dict[str, Call] = {
            "write": lambda: torch.empty_like(here.base, dtype=result).fill_(1.0),
            "product": lambda: a @ a,
        }
        seconds = contest({**timed, **calls}, rounds=rounds)
        write, product = seconds.pop("write"), seconds.pop("product")
        floor = [w + flops * p / (2 * _PRODUCT**3) for w, p in zip(write, product, strict=True)]
        return Row(
            question=operation,
            kind=kind,
            case=str(shape),
            dtype=str(dtype).removeprefix("torch."),
            reference="floor",
            reference_ms=1e3 * Spread.of(floor).median,
            ratio=ratios(seconds, floor),
            memory={way: peak_bytes(call, device) / 1e6 for way, call in calls.items()},
            error=wrong,
        )


def _ours(operation: str, adapter: Any, layer: nn.Module, kind: str) -> Call:
    geometry = of(layer)
    weight = cast(Tensor, layer.weight).detach().clone()
    W = geometry.matrix(weight)
    if operation == "dense":
        return lambda: adapter.delta(W).dense()
    if operation == "add":
        return lambda: add_([adapter.delta(W)], weight, geometry)
    if operation == "watch":
        cache = WeightCache()
        return lambda: adapter.inner_and_sqnorm(W, cache)
    return lambda: registry.build(kind, geometry.shape, W, None, **KINDS[kind][0])


def _theirs(operation: str, way: str, kind: str, model: nn.Module) -> Call | None:
    """The peer's own call for the same, where it has one."""
    if operation == "dense" and kind in ("lora", "loha", "lokr"):
        if way == "lycoris":
            module = cast(Any, model.adapter)
            return lambda: module.get_diff_weight(1.0)
        if way == "peft":
            adapted_layer = cast(Any, model.layer)
            return lambda: adapted_layer.get_delta_weight("default")
    if operation == "add":
        if way == "lycoris":
            merging = cast(Any, model.adapter)
            return lambda: merging.merge_to(1.0)
        if way == "peft":
            return _merging_again(model.layer)
    return None


def _merging_again(layer: Any) -> Callable[[], None]:
    def merge() -> None:
        layer.merged_adapters.clear()  # it would refuse the second time
        layer.merge()

    return merge


def _error(adapter: Any, W: Tensor, ours: Tensor) -> float:
    exact = copy.deepcopy(adapter).double().delta(W.double()).dense()
    return ((ours.double() - exact).norm() / exact.norm()).item()
