"""LoRA-SB: frames that a small matrix is trained between, made of the first step of full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftkit.adapters.frame import frame
from peftkit.errors import require_option
from peftkit.training.starts.protocol import Factors, Seen, Start


@dataclass(frozen=True)
class LoRASB(Start):
    """Takes the leading r singular vectors of the first step of full fine-tuning as frames: B = U_r and A = V_rᵀ.

    The gradient of R in ΔW = γ·B·R·A is then the projection of G (https://arxiv.org/abs/2411.19557). It is for
    `lora-xs` with start="given". The paper begins with R = −η·S_r, after the first step; here ΔW is 0.

    Args:
        sign: Take the step of Adam, sign(G), as the paper does, which keeps every gradient whole, m·n numbers a weight;
            by default that of gradient descent, G, of which sketches do.
    """

    sign: bool = False
    name: ClassVar[str] = "lora-sb"
    needs: ClassVar[str] = "gradient"
    gives: ClassVar[frozenset[str]] = frozenset({"frame"})

    def __post_init__(self) -> None:
        require_option(isinstance(self.sign, bool), "sign", self.sign, "True or False")

    @property
    def whole(self) -> bool:
        return self.sign

    def factors(self, seen: Seen) -> Factors:
        G, r = seen.of_gradient(), seen.rank
        if not self.sign:
            return Factors(G.U[:, :r], G.V[:r], G.energy(r))
        U, S, V = frame(((G.U * G.S) @ G.V).sign(), r)
        rows, columns = seen.weight.shape
        return Factors(U, V, float(S.square().sum()) / (rows * columns))
