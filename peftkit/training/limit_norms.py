"""Max-norm regularisation: a ΔW that is longer than a bound is scaled down to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from peftkit.errors import NormError, require_number
from peftkit.wrapping.divided import require_not_empty
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, names_of
from peftkit.wrapping.pipeline import of_models


class LimitedNorm(NamedTuple):
    """A ΔW that was scaled down.

    Attributes:
        weight: the name of its weight.
        name: of the adapter.
        norm: ‖ΔW‖_F before.
        factor: what ΔW was multiplied by.
    """

    weight: str
    name: str
    norm: float
    factor: float


@of_models
@torch.no_grad()
def limit_norms_(model: nn.Module, most: float, name: str | None = None) -> tuple[LimitedNorm, ...]:
    r"""Scale every ΔW with ‖ΔW‖_F above a bound down to it, in place, after an optimiser step.

    This is `scale_weight_norms` of kohya's sd-scripts. The norm is that of ΔW at strength 1, by closed form, in eval
    mode. The parameters to which ΔW is proportional are multiplied: `up` of LoRA, with which B·A becomes c·B·A.

    Args:
        model: a wrapped model.
        most: the bound, above 0. It is met up to the rounding of the parameters' dtype.
        name: of one adapter; by default all, each ΔW by itself.

    Returns:
        The ΔW that were scaled, in the order of the model, with their norms and by how much.

    Raises:
        NormError: an adapter whose ΔW is proportional to none of its parameters, as DoRA, LoLDU, OFT and BOFT, or a ΔW
            that is not finite. Nothing is changed then.
        OptionError: the bound is not a positive, finite number.
        UnknownAdapterError: there is no adapter of that name, or none at all.
        MergeStateError: an adapter is merged into its weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> pk.limit_norms_(model, most=1.0)
        (LimitedNorm(weight='0', name='default', norm=4.0, factor=0.25),)
        >>> pk.limit_norms_(model, most=1.0)
        ()
    """
    require_number("most", most, positive=True)
    require_not_empty(model)
    installed = list(installed_adapters(model, names_of(model, name)))
    scaling = [_scaling_parameters(at) for at in installed]
    limited: list[LimitedNorm] = []
    norms = _norms(installed)
    for at, norm in zip(installed, norms, strict=True):
        if not math.isfinite(norm):
            raise NormError(f"{at.site}[{at.name}]: ‖ΔW‖ is {norm}, a finite norm was expected: the run has diverged")
    for at, norm, parameters in zip(installed, norms, scaling, strict=True):
        if norm > most:
            limited.append(LimitedNorm(at.site, at.name, norm, most / norm))
            for parameter in parameters:
                parameter.mul_(most / norm)
    return tuple(limited)


def _scaling_parameters(at: InstalledAdapter) -> list[nn.Parameter]:
    """The parameters that, times c, make ΔW c·ΔW; raises where there are none."""
    at.require_unmerged("limiting its norm")
    found = [p for key, p in at.adapter.named_parameters() if key in at.adapter.scaling_parameters]
    if not found:
        raise NormError(
            f"{at.site}[{at.name}]: the ΔW of {at.adapter.kind} is proportional to none of its parameters, so that its "
            "norm cannot be scaled. Name other adapters; oft and boft have a bound of their own in constraint=, loldu "
            "in epsilon="
        )
    return found


def _norms(installed: Sequence[InstalledAdapter]) -> list[float]:
    """‖ΔW‖_F of each adapter at strength 1, fetched from their device together."""
    squares = [at.change().upcast().sqnorm().double() for at in installed]
    return torch.stack([square.to(squares[0].device) for square in squares]).clamp(min=0).sqrt().tolist()
