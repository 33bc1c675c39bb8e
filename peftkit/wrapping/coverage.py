"""How much of a model's weights a plan adapts, by type of layer, and a warning where a preset adapts little."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from peftkit.errors import CoverageWarning
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.layer import Adapted, base_class
from peftkit.wrapping.sites import Site

#: below this share of what a preset stands for, wrapping warns
_LITTLE = 0.5


class Covered(NamedTuple):
    """Count the numbers in weight matrices of one type of layer: those that get an adapter, and all."""

    adapted: int
    total: int


def type_name(module: nn.Module) -> str:
    """Return the name of a module's class, before wrapping changed it."""
    return (base_class(module) if isinstance(module, Adapted) else type(module)).__name__


def weights_of(module: nn.Module) -> int:
    """Return how many numbers stand in a module's own weights of two or more dimensions, unpacked."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):  # a quantised parameter packs several into a byte
        return sizes[0] * sizes[1]
    own = (p for p in own_parameters(module).values() if p is not None and not is_lazy(p))
    return sum(p.numel() for p in own if p.dim() > 1)


def coverage(modules: Iterable[nn.Module], chosen: Iterable[Site]) -> dict[str, Covered]:
    """Return the share of each type of layer that holds weights, the largest first.

    Args:
        modules: of the model, each once.
        chosen: the weights that get an adapter.
    """
    totals: dict[str, int] = {}
    for module in modules:
        if size := weights_of(module):
            totals[type_name(module)] = totals.get(type_name(module), 0) + size
    adapted: dict[str, int] = {}
    for site in _matrices(chosen):
        own = type_name(site.module)
        adapted[own] = adapted.get(own, 0) + site.slot.geometry.shape.rows * site.slot.geometry.shape.columns
    ordered = sorted(totals, key=lambda name: -totals[name])
    return {name: Covered(adapted.get(name, 0), totals[name]) for name in ordered}


def _matrices(chosen: Iterable[Site]) -> list[Site]:
    return [site for site in chosen if not site.slot.geometry.vector]


def described(shares: Mapping[str, Covered], chosen: Collection[Site] = ()) -> str:
    """Return one line: the share of all weights, and of each type of layer; and how many vectors are chosen."""
    adapted, total = sum(s.adapted for s in shares.values()), sum(s.total for s in shares.values())
    parts = ", ".join(f"{name} {100 * s.adapted / s.total:.3g} %" for name, s in shares.items())
    count = len(chosen) - len(_matrices(chosen))
    beside = f"; and {count} norms and biases" if count else ""
    return f"adapts layers that hold {100 * adapted / max(total, 1):.3g} % of {total:,} weights: {parts}{beside}"


def warn_of_little(preset: str, adapted: Collection[Site], skipped: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Warn if a preset leaves out more of the weights that it stands for than it adapts.

    Args:
        preset: its name.
        adapted: the weights that it selects.
        skipped: by name, modules that it would select if they could be adapted, with the reason why not.
    """
    have = sum(site.slot.geometry.shape.rows * site.slot.geometry.shape.columns for site in adapted)
    sizes: dict[tuple[str, str], int] = {}
    for module, reason in skipped.values():
        key = type_name(module), reason
        sizes[key] = sizes.get(key, 0) + weights_of(module)
    lack = sum(sizes.values())
    if have >= _LITTLE * (have + lack):
        return
    most = sorted(sizes, key=lambda key: -sizes[key])[:3]
    listed = "; ".join(f"{name} ({100 * sizes[name, why] / (have + lack):.3g} %): {why}" for name, why in most)
    warnings.warn(
        f"targets={preset!r} adapts {100 * have / (have + lack):.3g} % of the weights it stands for. Skipped are "
        f"{listed}. Adapt a model whose weights are ordinary matrices, or say by targets= which layers are meant",
        CoverageWarning,
        stacklevel=4,
    )
