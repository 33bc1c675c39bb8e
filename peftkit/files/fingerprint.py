"""Tell one base weight from another by a few entries, which survive a cast; refuse a file trained on another base."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.errors import WrongBaseError
from peftkit.files.formats import native

_SAMPLES = 32


def sample_index(size: int) -> Tensor:
    """Where a fingerprint looks in a weight of that many entries, row by row."""
    return torch.linspace(0, size - 1, _SAMPLES, dtype=torch.float64).long()


def samples(weight: Tensor) -> np.ndarray:
    """The fingerprint of W (m, n): entries spread evenly over it, in float32."""
    index = sample_index(weight.numel()).to(weight.device)
    return weight.detach()[index // weight.shape[1], index % weight.shape[1]].float().cpu().numpy()


def require_same_base(
    file: object,
    base: str,
    distances: Mapping[str, float],
    kinds: Mapping[str, str],
    bound: Collection[str],
    other_base: bool,
) -> None:
    """Raise WrongBaseError if a file's fingerprints are of other weights than the base's.

    Args:
        file: the adapter file, for the error.
        base: the base, for the error.
        distances: weight -> how far it is from its fingerprint.
        kinds: weight -> kind of its adapter.
        bound: the weights whose ΔW is made of factors of their base; other_base does not help these.
        other_base: whether the user accepts another base.
    """
    far = [name for name, distance in distances.items() if distance > native.SAME_BASE]
    lost = [name for name in far if name in bound]
    if not far or (other_base and not lost):
        return
    worst = max(far, key=lambda name: distances[name])
    meaning = "; ".join(f"{k} {registry.get(k).on_another_base}" for k in sorted({kinds[n] for n in lost or far}))
    advice = "" if lost else " To use it there on purpose, pass other_base=True."
    raise WrongBaseError(
        f"{file} was trained on another base than {base}: {len(far)} of {len(distances)} weights differ, most of all "
        f"{worst or 'its own'} by {100 * distances[worst]:.3g} %. On another base, {meaning}.{advice}"
    )
