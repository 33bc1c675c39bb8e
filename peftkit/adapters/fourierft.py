"""FourierFT: a few coefficients of the change's two-dimensional spectrum."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import factory, misplaced, require
from peftkit.adapters.peft_form import PeftForm
from peftkit.adapters.registry import register
from peftkit.delta import Delta, Dense, LowRank
from peftkit.delta.base import WeightCache
from peftkit.geometry import Shape
from peftkit.kernels.blocks import upcast


@functools.lru_cache(maxsize=8)  # layers of one size have the same, and a permutation of all of them is slow to draw
def places(rows: int, columns: int, count: int, seed: int) -> Tensor:
    """Return which frequencies (u, v) of an m×n spectrum a seed draws, (2, k), as PEFT does."""
    drawn = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed), device="cpu")[:count]
    return torch.stack((drawn // columns, drawn % columns))


@register("fourierft")
class FourierFT(Adapter):
    r"""Adds the matrix that has a few frequencies: ΔW = s·Re(ifft2(C)), with C[u_l, v_l] = c_l and 0 elsewhere.

    The parameter is `spectrum`, c (k,), which starts at 0 (in the paper at N(0, 1)). `indices` (2, k) are the places
    (u_l, v_l) in the m×n spectrum, drawn without repetition by `seed`; they are in the file. ΔW[i, j] is
    s/(mn)·Σ_l c_l·cos 2π(u_l·i/m + v_l·j/n), of rank up to 2k: it is computed as two factors where they are small, else
    by the inverse transform.

    Paper: https://arxiv.org/abs/2405.03003.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        frequencies: k, at most m·n; 1000 by default, or m·n where that is less.
        scaling: s.
        seed: Of the places; 777 as in PEFT.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "fourierft", frequencies=20)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # k
        20
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.03003"
    facts: ClassVar[Facts] = Facts(
        "frozen factors", "s·Re(ifft2(C))", "a thousand numbers a layer must do, of any rank", peft="FourierFTConfig"
    )
    convention: ClassVar[str] = "s*Re(ifft2(spectrum at indices))"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"spectrum"})
    decays = frozenset({"spectrum"})
    indices: Tensor

    def __init__(
        self, shape: Shape, weight: Tensor, *, frequencies: int | None = None, scaling: float = 150.0, seed: int = 777
    ) -> None:
        super().__init__()
        size = shape.rows * shape.columns
        count = min(1000, size) if frequencies is None else frequencies
        require(0 < count <= size, "fourierft", "frequencies", frequencies, f"1 to {size}, the numbers of {shape}")
        self.options = {"frequencies": count}
        self.rows, self.columns, self.scaling, self.seed = shape.rows, shape.columns, scaling, seed
        new = factory(weight)
        self.spectrum = nn.Parameter(torch.zeros(count, **new))
        self.register_buffer("indices", places(shape.rows, shape.columns, count, seed).to(new["device"], copy=True))

    def delta(self, weight: Tensor) -> Delta:
        del weight
        u, v = self.indices
        if 4 * len(u) >= min(self.rows, self.columns):
            wide = torch.promote_types(self.spectrum.dtype, torch.float32)  # no transform takes 16 bits
            spectrum = self.spectrum.new_zeros(self.rows, self.columns, dtype=wide)
            delta = torch.fft.ifft2(spectrum.index_put((u, v), self.spectrum.to(wide))).real * self.scaling
            return Dense(delta.to(self.spectrum.dtype))
        scale = self.scaling / (self.rows * self.columns)
        outer, inner = (self._angles(size, at) for size, at in ((self.rows, u), (self.columns, v)))
        up = scale * torch.cat((outer.cos() * self.spectrum, -outer.sin() * self.spectrum), dim=1)
        return LowRank(up, torch.cat((inner.cos(), inner.sin()), dim=1).mT)

    def _angles(self, size: int, frequency: Tensor) -> Tensor:
        """2π·frequency·i/size, (size, k), with the whole turns left out before they are rounded."""
        place = torch.arange(size, device=frequency.device)[:, None]
        return (place * frequency % size).to(self.spectrum.dtype) * (2 * math.pi / size)

    def refused(self, tensors: Mapping[str, Tensor]) -> str:
        return misplaced(tensors["indices"], self.rows, self.columns)

    def form(self, weight: Tensor) -> PeftForm | None:
        options = {"n_frequency": len(self.spectrum), "scaling": self.scaling, "random_loc_seed": self.seed}
        if not places(self.rows, self.columns, len(self.spectrum), self.seed).equal(self.indices.cpu()):
            return None  # PEFT stores no places
        own = {"fourierft_spectrum": self.spectrum}
        return PeftForm("fourierft", ("FOURIERFT", options), own, self.delta(weight))

    def inner_and_sqnorm(self, weight: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        # s/(mn)·Σ c_l·Re fft2(W)[u_l, v_l], and s²/(mn)·‖(C + C⁻)/2‖², where C⁻[u, v] = C[−u, −v]
        c, scale = upcast(self.spectrum), self.scaling / (self.rows * self.columns)
        seen = cache("seen", lambda: torch.fft.fft2(weight.to(c.dtype)).real[tuple(self.indices)])
        mirrored = torch.cat((c, c.new_zeros(1)))[cache("mirror", self._mirror)]
        return scale * torch.dot(c, seen), scale * self.scaling / 2 * torch.dot(c, c + mirrored)

    def _mirror(self) -> Tensor:
        """The number of the frequency at (−u_l, −v_l), (k,); k where it is none of them."""
        u, v = self.indices
        place, opposite = u * self.columns + v, -u % self.rows * self.columns + -v % self.columns
        ascending, order = place.sort()
        at = torch.searchsorted(ascending, opposite).clamp(max=len(u) - 1)
        return torch.where(ascending[at] == opposite, order[at], len(u))
