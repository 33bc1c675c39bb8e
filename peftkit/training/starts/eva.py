"""EVA: the directions that a layer's inputs have most of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftkit.training.starts.protocol import Factors, Seen, Start


@dataclass(frozen=True)
class EVA(Start):
    """Takes the leading r right singular vectors of a layer's inputs: A₀ = V_rᵀ, B₀ = 0.

    The inputs are not centred, as PEFT's are, so that their mean is a direction like the others
    (https://arxiv.org/abs/2410.07170). It is for `lora`, `lora-fa` and `anchored` with start="given".
    """

    name: ClassVar[str] = "eva"
    needs: ClassVar[str] = "inputs"
    gives: ClassVar[frozenset[str]] = frozenset({"factors", "input"})

    def factors(self, seen: Seen) -> Factors:
        inputs, r = seen.of_inputs(), seen.rank
        return Factors(inputs.V.new_zeros(seen.weight.shape[0], r), inputs.V[:r], inputs.energy(r))
