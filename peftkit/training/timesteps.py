"""The timestep of a diffusion, for adapters whose ranks depend on it."""

from __future__ import annotations

import math

from torch import nn

from peftkit.errors import OptionError, require_option
from peftkit.wrapping.installed import installed_parts
from peftkit.wrapping.pipeline import of_models


@of_models
def use_timestep(
    model: nn.Module, timestep: float | None, *, steps: float = 1000, power: float = 1.0, name: str | None = None
) -> None:
    """Say at which timestep the next forward is: adapters whose ranks depend on it use fewer where there is more noise.

    T-LoRA's (https://arxiv.org/abs/2507.05964) use min_rank + ⌊((T − t)/T)^a·(r − min_rank)⌋ ranks, until they are told
    another timestep. It holds for a whole batch, and in merges and exports too: give None before these.

    Args:
        model: a wrapped model.
        timestep: t, from 0, without noise, to T; None for all ranks.
        steps: T.
        power: a, above 0; with a larger one, noisy steps use fewer ranks.
        name: of one adapter; by default all.

    Raises:
        OptionError: no adapter's ranks depend on it, or a number is out of range.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "t-lora", rank=4)
        >>> for t in (900, 100):
        ...     pk.training.use_timestep(model, t)
        ...     print(next(model[0].adapters.children()).used)
        1
        3
    """
    for option, value in (("steps", steps), ("power", power)):
        require_option(math.isfinite(value) and value > 0, option, value, "a number above 0")
    fits = timestep is None or 0 <= timestep <= steps
    require_option(fits, "timestep", timestep, f"a number from 0 to steps, {steps}, or None")
    parts = [part for part in installed_parts(model, name) if type(part.adapter).follows_timesteps]
    if not parts:
        raise OptionError(
            "use_timestep: the ranks of no adapter of the model depend on it: wrap with such a kind, t-lora"
        )
    share = None if timestep is None else ((steps - timestep) / steps) ** power
    for part in parts:
        part.adapter.use_prefix(share)
