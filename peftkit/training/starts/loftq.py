"""LoftQ: what a quantised base lost, as the first ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from peftkit.adapters.frame import frame
from peftkit.errors import OptionError
from peftkit.training.starts.protocol import Factors, Seen, Start


@dataclass(frozen=True)
class LoftQ(Start):
    """Begins at the best ΔW of rank r for what quantising lost: γ·B₀·A₀ ≈ W − Q, W the weight before, Q after.

    This is the one round that leaves Q as it is (https://arxiv.org/abs/2310.08659); further rounds would quantise the
    base anew. ΔW is not 0: the model begins nearer to what it was before it was quantised. It is for `lora` and
    `anchored` with start="given".

    Args:
        original: the weights before quantising, by their names in the model's state dict, as `load_file` of
            safetensors gives them.
    """

    original: Mapping[str, Tensor]
    name: ClassVar[str] = "loftq"
    gives: ClassVar[frozenset[str]] = frozenset({"factors", "input"})

    def __post_init__(self) -> None:
        if not isinstance(self.original, Mapping):
            raise OptionError(f"original={self.original!r} was given, weights by their names were expected")

    @property
    def moves(self) -> bool:
        return True

    def factors(self, seen: Seen) -> Factors:
        if seen.parameter not in self.original:
            raise OptionError(f"loftq: original has no {seen.parameter!r}: give the weights before quantising by name")
        before = seen.matrix(self.original[seen.parameter])
        if not bool(before.isfinite().all()):
            raise OptionError(f"loftq: original has numbers in {seen.parameter!r} that are not finite")
        U, S, V = frame(before.to(seen.weight.device).float() - seen.weight.float())
        r = seen.rank
        root = (S[:r] / abs(seen.scale)).sqrt()
        sign = -1.0 if seen.scale < 0 else 1.0
        energy = float(S[:r].square().sum() / S.square().sum().clamp(min=1e-30))
        return Factors(U[:, :r] * root * sign, root[:, None] * V[:r], energy)
