"""One measurement of a model: cosines and norms by weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peftkit.monitor.spectrum import Spectrum


@dataclass(frozen=True)
class Record:
    """Holds one measurement of the adapted weights of a model.

    One adapter is measured at strength 1. Several are measured as Σ λᵢ·ΔWᵢ, and `alone` has each at strength 1.

    Attributes:
        step: The optimiser steps before the measurement.
        per_module: cos(ΔW, W) = <ΔW, W>/(‖ΔW‖·‖W‖) by weight, 0 where a norm is 0.
        norms: ‖ΔW‖_F by weight.
        ratios: ‖ΔW‖_F/‖W‖_F by weight.
        lr: The largest learning rate of the adapters' parameters, None where it is not known.
        gradients: The norm of the adapters' gradient by weight, if asked for.
        alone: A record for each adapter by name, where there are several.
        spectra: The ranks of ΔW by weight, if asked for.
        sizes: The count of numbers in each W, if the mean is to be weighed by it.

    Example:
        >>> record = pk.monitor.Record(20, {"a": 0.1, "b": 0.3}, {"a": 1.0, "b": 2.0}, {"a": 0.02, "b": 0.04})
        >>> record.cs, record.ratio
        (0.2, 0.03)
    """

    step: int
    per_module: dict[str, float]
    norms: dict[str, float]
    ratios: dict[str, float]
    lr: float | None = None
    gradients: dict[str, float] = field(default_factory=dict)
    alone: dict[str, Record] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def cs(self) -> float:
        """The mean of `per_module` over all adapted weights, moved or not; weighed by `sizes`, if they are known."""
        if not self.sizes:
            return math.fsum(self.per_module.values()) / len(self.per_module)
        total = sum(self.sizes[site] for site in self.per_module)
        return math.fsum(self.sizes[site] * cosine for site, cosine in self.per_module.items()) / total

    @property
    def ratio(self) -> float:
        """The mean of `ratios`."""
        return math.fsum(self.ratios.values()) / len(self.ratios)

    @property
    def finite(self) -> bool:
        """Whether all cosines and norms are finite; if not, the run has diverged."""
        return all(map(math.isfinite, self.per_module.values())) and all(map(math.isfinite, self.norms.values()))

    @property
    def zero(self) -> bool:
        """Whether every ΔW is 0, so that no cosine is defined."""
        return not any(self.norms.values())
