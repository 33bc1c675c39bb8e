"""The training step of one adapted layer: forward and backward, over the same layer frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import Host, adapted, ways
from peftkit.bench.timing import contest, ratios


def measure(
    shape: LayerShape, kind: str, dtype: torch.dtype, device: str, peers: list[str], rounds: int
) -> dict[str, Any]:
    """Ratios to the frozen layer of ours and every peer, with the bytes that autograd keeps beyond the input."""
    torch.manual_seed(0)
    layer = shape.layer(dtype, device)
    frozen = Host(layer)
    x = shape.input(dtype, device).requires_grad_()
    with torch.no_grad():
        g = torch.randn_like(layer(x))
    models = {way: adapted(way, kind, layer) for way in ways(peers, kind)}
    steps: dict[str, Callable[[], object]] = {"frozen": _step(frozen, x, g)}
    steps |= {way: _step(model, x, g) for way, model in models.items()}
    seconds = contest(steps, rounds=rounds)
    return {
        "frozen ms": round(1e3 * sorted(seconds["frozen"])[rounds // 2], 3),
        "ratio": {way: spread.rounded() for way, spread in ratios(seconds, "frozen").items()},
        "kept MB": {way: round(kept(model, x) / 1e6, 4) for way, model in models.items()},
    }


def _step(model: nn.Module, x: Tensor, g: Tensor) -> Callable[[], object]:
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model(x), wanted, g)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, beyond the input and what the model holds anyway."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)  # alive until all is counted, so that no address is used twice
    del out
    return sum(found.values())
