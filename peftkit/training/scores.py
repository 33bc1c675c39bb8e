"""Scores: what each rank of each weight is worth, from one pass over data, for `spread` and for plans with a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftkit.errors import require_integer
from peftkit.training.stand_in import require_gradients
from peftkit.training.starts.gradients import Gradient, gradients_of
from peftkit.training.starts.inputs import Inputs, inputs_of
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.roll import roll_of
from peftkit.wrapping.wrap import unwrap, wrap

#: the name of the adapters that stand where the pass looks, while it does
_NAME = "peftkit_scores"


@of_models
def gradient_energy(
    model: nn.Module,
    batches: Iterable[Any],
    backward: Callable[[nn.Module, Any], object],
    *,
    targets: str | Sequence[str] = "full",
    exclude: str | Sequence[str] = (),
    most: int = 16,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return σᵢ(G)² of the gradient G of each weight over some batches: how fast its i-th rank can lower the loss.

    A step of gradient descent of rank r lowers the loss by η·Σ_{i≤r} σᵢ(G)², to first order. The gradients are
    sketched and not kept, as `pk.start` does, with k = 1.5·most; in a group of processes they are those of all the
    data. The model stays as it is.

    Args:
        model: wrapped or not.
        batches: what `backward` is called with, one after another.
        backward: called as backward(model, batch), it computes a loss and calls its backward().
        targets: patterns of layers, as in `wrap`.
        exclude: patterns of layers to leave out.
        most: how many ranks of each weight are looked at.
        seed: of the sketch.

    Returns:
        Weight -> σ₁², σ₂², …, falling; zeros for a weight that no gradient came to.

    Raises:
        TargetError: a target matches no layer.
        OptionError: an option has a value it cannot take, a weight is a stack of experts, or a gradient is not finite.
        MergeStateError: adapters are merged into a weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> batches = [torch.randn(16, 8) for _ in range(2)]
        >>> scores = pk.training.gradient_energy(model, batches, lambda m, x: m(x).square().mean().backward(), most=4)
        >>> plan = pk.plan(model, "lora", budget="300B", scores=scores)
        >>> plan.bytes
        256
    """
    require_integer("most", most, 1, "an integer")
    with _looking(model, targets, exclude) as found:
        seen, _ = gradients_of(model, found, batches, backward, k=_sizes(found, most), seed=seed)
        return _scores(found, seen, most)


@of_models
def explained_variance(
    model: nn.Module,
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], object] | None = None,
    *,
    targets: str | Sequence[str] = "full",
    exclude: str | Sequence[str] = (),
    most: int = 16,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return the share of each layer's inputs that is in their i-th direction, as EVA divides ranks by.

    The shares are of Σ‖x‖², so that layers compare whatever the size of their inputs
    (https://arxiv.org/abs/2410.07170; not centred, as PEFT's are).

    Args:
        model: wrapped or not.
        batches: what `call` is called with, one after another.
        call: called as call(model, batch); by default the model is called with the batch.
        targets: patterns of layers, as in `wrap`.
        exclude: patterns of layers to leave out.
        most: how many ranks of each weight are looked at.
        seed: of the sketch.

    Returns:
        Weight -> its shares, falling; zeros for a layer that was not called.

    Raises:
        TargetError: a target matches no layer.
        OptionError: an option has a value it cannot take, a weight is read by its module or looked up, and has no
            inputs, or an input is not finite.
        MergeStateError: adapters are merged into a weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> _ = pk.wrap(model, "lora", rank=4)
        >>> scores = pk.training.explained_variance(model, [torch.randn(16, 8)], most=8)
        >>> ranks = pk.training.spread(scores, dict.fromkeys(scores, 1), 8)  # as many ranks as before, put elsewhere
        >>> changed = pk.resize_(model, ranks)
    """
    require_integer("most", most, 1, "an integer")
    with _looking(model, targets, exclude) as found:
        seen, _ = inputs_of(model, found, batches, call, k=_sizes(found, most), seed=seed)
        return _scores(found, seen, most)


def _scores(
    found: Sequence[InstalledAdapter], seen: Sequence[Gradient | Inputs | None], most: int
) -> dict[str, list[float]]:
    """What each rank of each weight is worth, of no more than its matrix has."""
    shapes = [at.slot.geometry.shape for at in found]
    counts = [min(most, shape.rows, shape.columns) for shape in shapes]
    values = [[0.0] * n if own is None else own.worth()[:n].tolist() for n, own in zip(counts, seen, strict=True)]
    return dict(zip([at.site for at in found], values, strict=True))


@contextmanager
def _looking(
    model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str]
) -> Iterator[list[InstalledAdapter]]:
    """Put an adapter on each target, which changes nothing, and take all off again."""
    before = roll_of(model)
    pending = before is None or before.pending
    require_gradients()
    wrap(model, "lora", targets=targets, exclude=exclude, name=_NAME, tied="share", rank=1)
    roll = roll_of(model)
    assert roll is not None
    roll.pending = False  # a layer that the pass does not use is worth nothing, and no fault
    try:
        yield list(installed_adapters(model, [_NAME]))
    finally:
        unwrap(model, _NAME)
        roll.pending = pending


def _sizes(found: Sequence[InstalledAdapter], most: int) -> list[int]:
    """How many rows the sketch of each weight has: a half more than are wanted, and no more than there are."""
    return [min(most + (most + 1) // 2 + 2, at.slot.geometry.shape.columns) for at in found]
