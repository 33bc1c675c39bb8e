"""Gates that are searched for: which adapters the loss on validation data wants to act."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.delta.base import Delta
from peftkit.errors import OptionError, require_number
from peftkit.training.stand_in import require_finite, require_function, require_whole, standing_in
from peftkit.training.starts.processes import sum_over_processes
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, one_name
from peftkit.wrapping.pipeline import of_models


@of_models
def searched_gates(
    model: nn.Module,
    pairs: Iterable[tuple[Any, Any]],
    backward: Callable[[nn.Module, Any], object],
    *,
    lr: float = 1e-3,
    gate_lr: float = 1e-2,
    name: str | None = None,
) -> dict[str, float]:
    """Return how strongly each adapter of a model should act, found by training gates beside the adapters.

    Each adapter gets a gate, gᵢ = L·softmax(a)ᵢ over the L adapters, all 1 at first: ΔW becomes gᵢ·ΔW. Of each pair,
    AdamW moves the adapters by the training batch, then Adam moves a by the validation batch; in a group of processes
    by the gradients of all. Adapters and model are then put back as they were: give those with small gates no rank by
    `pk.resize_`, and train.

    Experimental: a reading of DiffoRA (https://arxiv.org/abs/2502.08905), and of Flexora
    (https://arxiv.org/abs/2408.10774) with one step in the place of its unrolled ones; both texts were not at hand.

    Args:
        model: a wrapped model.
        pairs: (training batch, validation batch), one after another.
        backward: called as backward(model, batch), it computes a loss and calls its backward().
        lr: learning rate of the adapters.
        gate_lr: learning rate of a.
        name: of the adapter; may be left out where there is only one.

    Returns:
        Weight -> its gate; their mean is 1.

    Raises:
        OptionError: a rate is not above 0, an adapter does not act, or no gradient, or none that is finite, came to the
            gates.
        MergeStateError: the adapter is merged.
        UnsupportedLayerError: the model is inside DistributedDataParallel, or the adapter is divided among processes.
        UnknownAdapterError: there is no adapter of that name, or several and none is named.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> pairs = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)]
        >>> gates = pk.training.searched_gates(model, pairs, lambda m, x: (m(x) - x).square().mean().backward())
        >>> keep = sorted(gates, key=gates.get)[1:]  # all but the weakest
        >>> changed = pk.resize_(model, {weight: 0 for weight in gates if weight not in keep})
    """
    require_number("lr", lr, positive=True)
    require_number("gate_lr", gate_lr, positive=True)
    require_function(backward)
    found = list(installed_adapters(model, [one_name(model, name)]))
    require_whole(found, "search gates")
    logits = nn.Parameter(torch.zeros(len(found)))
    with _numbers_kept(found), standing_in(model, found, lambda index, at: _Gated(at.adapter, logits, index)):
        own = [p for at in found for p in at.adapter.parameters() if p.requires_grad]
        adapters, gates = torch.optim.AdamW(own, lr=lr), torch.optim.Adam([logits], lr=gate_lr)
        for training, validation in pairs:
            for optimizer, batch in ((adapters, training), (gates, validation)):
                model.zero_grad()
                logits.grad = None
                backward(model, batch)
                sum_over_processes([[parameter] for group in optimizer.param_groups for parameter in group["params"]])
                optimizer.step()
        if logits.grad is None:
            raise OptionError("no gradient came to the gates: give pairs of batches, and a loss of the adapted layers")
    values = _gates(logits.detach()).tolist()
    for at, value in zip(found, values, strict=True):
        require_finite(at, "the gradient of its gate", value)
    return {at.site: value for at, value in zip(found, values, strict=True)}


def _gates(logits: Tensor) -> Tensor:
    return len(logits) * logits.softmax(0)


class _Gated(Adapter):
    """gᵢ·ΔW of an adapter. The gates are of several adapters, and no parameter of any of them."""

    kind = "gated"

    def __init__(self, inner: Adapter, logits: nn.Parameter, index: int) -> None:
        super().__init__()
        self.inner = inner
        self.options, self.shape = inner.options, inner.shape
        self.reads_base, self.linear, self.stochastic = inner.reads_base, inner.linear, inner.stochastic
        self.input_dropout = inner.input_dropout
        self._gate: Callable[[], Tensor] = lambda: _gates(logits)[index]

    def delta(self, weight: Tensor) -> Delta:
        return self.at(weight, 1.0)

    def at(self, weight: Tensor, strength: float | Tensor) -> Delta:
        held = next(self.inner.parameters())
        return self.inner.at(weight, strength * self._gate().to(held.device, held.dtype))


@contextmanager
def _numbers_kept(found: Sequence[InstalledAdapter]) -> Iterator[None]:
    """Leave the numbers of adapters as they were."""
    numbers = [copy.deepcopy(at.adapter.state_dict()) for at in found]
    try:
        yield
    finally:
        for at, held in zip(found, numbers, strict=True):
            at.adapter.load_state_dict(cast("dict[str, Any]", held))
