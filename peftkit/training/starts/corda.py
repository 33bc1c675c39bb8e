"""CorDA: the parts of a base that its inputs use most, or least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftkit.adapters.frame import frame
from peftkit.errors import require_choice
from peftkit.training.starts.protocol import Factors, Seen, Start

#: of the mean of C's diagonal, added to all of it so that C has an inverse, as in the released code and in PEFT
_DAMPING = 0.01


@dataclass(frozen=True)
class CorDA(Start):
    """Takes r singular triples of W·C, with C = Σ x·xᵀ of the inputs: γ·B₀·A₀ = U_r·S_r·V_rᵀ·C⁻¹.

    C is what the sketch has of it, plus 1 % of its mean diagonal (https://arxiv.org/abs/2406.05223). It is for
    `anchored` with start="given".

    Args:
        mode: "ipm" trains what of W acts most on these inputs, which are of the new task ("instruction-previewed");
            "kpm" what acts least on them, which are of what the model is to keep ("knowledge-preserved").
    """

    mode: str = "ipm"
    name: ClassVar[str] = "corda"
    needs: ClassVar[str] = "inputs"
    gives: ClassVar[frozenset[str]] = frozenset({"factors"})

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, ("ipm", "kpm"))

    def factors(self, seen: Seen) -> Factors:
        inputs, r = seen.of_inputs(), seen.rank
        V, values = inputs.V, inputs.values
        W = seen.weight.to(V)
        damping = _DAMPING * inputs.total / W.shape[1] or 1.0
        U, S, right = frame((W @ V.mT * values) @ V + damping * W)
        part = slice(r) if self.mode == "ipm" else slice(len(S) - r, None)
        root = (S[part] / abs(seen.scale)).sqrt()
        # (Vᵀ·λ·V + d)⁻¹ = Vᵀ·(1/(λ + d) − 1/d)·V + 1/d
        turned = right[part]
        inverse = (turned @ V.mT * (1 / (values + damping) - 1 / damping)) @ V + turned / damping
        energy = float(S[part].square().sum() / S.square().sum().clamp(min=1e-300))
        return Factors(U[:, part] * root, root[:, None] * inverse, energy)
