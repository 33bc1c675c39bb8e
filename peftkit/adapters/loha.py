"""LoHa: the Hadamard product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Additive, PeftConfig
from peftkit.adapters.lora import tucker_down
from peftkit.adapters.options import factory, rank_scale, require, require_kernel, require_rank, times, uniform_fan_in_
from peftkit.adapters.registry import register
from peftkit.delta import Hadamard
from peftkit.geometry import Shape
from peftkit.kernels.cache import Memo

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


@dataclass(frozen=True)
class LoHaForm(Additive):
    """(B1·A1) ⊙ (B2·A2), as hada_w1_a, …, under alpha = rank: LyCORIS' merge would apply another scale twice."""

    delta: Hadamard

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        del program, shape, alpha
        delta = self.delta
        factors = {"hada_w1_a": delta.B1, "hada_w1_b": delta.A1, "hada_w2_a": delta.B2, "hada_w2_b": delta.A2}
        return factors | {"alpha": torch.tensor(float(delta.rank))}

    def peft_rank(self, shape: Shape) -> int:
        del shape
        return self.delta.rank

    @classmethod
    def peft_config(cls, written: Sequence[tuple[Any, Shape]]) -> PeftConfig:
        del written
        return "LOHA", {"use_effective_conv2d": False}


@register("loha")
class LoHa(Adapter):
    r"""Adds a Hadamard product: ΔW = γ·(B1·A1) ⊙ (B2·A2), γ = α/r, of rank up to r² for 2r(m + n) parameters.

    Parameters are `up1`, B1 (m, r); `down1`, A1 (r, n); `up2`, B2 (m, r); `down2`, A2 (r, n). With `tucker`, Ai = Ti·Vi
    with `core1` and `core2`, Ti (r, r, K), and `down1` and `down2`, Vi (r, channels).

    Papers: FedPara, https://arxiv.org/abs/2108.06098; LyCORIS, https://arxiv.org/abs/2309.14859.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 4 by default.
        alpha: α, by default the rank, so that γ = 1.
        tucker: Use Tucker factors, on kernels larger than 1.
        init: "lycoris" (default) draws B1 ~ N(0, 0.1²) and Ai ~ N(0, 1) and starts at B2 = 0; "peft" draws uniformly by
            fan-in and starts at A2 = 0. One step of a sign optimiser moves ΔW 116 times further under the first (768²,
            r = 8), so a learning rate does not carry over from one to the other.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "loha", rank=2)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))
        96
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2108.06098"
    facts: ClassVar[Facts] = Facts(
        "products",
        "γ·(B₁·A₁) ⊙ (B₂·A₂)",
        "a rank up to r² is wanted for twice a LoRA's numbers",
        peft="LoHaConfig",
        lycoris="loha",
    )
    convention: ClassVar[str] = "gamma*(up1@down1)*(up2@down2)"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"up1"})
    by_row: ClassVar[frozenset[str] | None] = frozenset({"up1", "up2"})
    resizable: ClassVar[frozenset[str]] = frozenset({"rank", "alpha", "init"})
    decays = frozenset({"up1", "down1", "core1", "up2", "down2", "core2"})
    additive = LoHaForm

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 4,
        alpha: float | None = None,
        tucker: bool = False,
        init: str = "lycoris",
    ) -> None:
        super().__init__()
        require_rank("loha", rank)
        require(init in ("lycoris", "peft"), "loha", "init", init, "'lycoris' or 'peft'")
        self.scale = rank_scale("loha", rank, alpha)
        self.starts_at_zero = frozenset({"up2" if init == "lycoris" else "down2"})
        new = factory(weight)
        inputs = shape.columns
        if tucker:
            require_kernel("loha", shape)
            inputs = shape.channels
        self.up1, self.up2 = (nn.Parameter(torch.empty(shape.rows, rank, **new)) for _ in range(2))
        self.down1, self.down2 = (nn.Parameter(torch.empty(rank, inputs, **new)) for _ in range(2))
        cores = [torch.empty(rank, rank, shape.positions, **new) for _ in range(2 if tucker else 0)]
        self._memo: Memo[Hadamard] = Memo()
        self.core1 = nn.Parameter(cores[0]) if tucker else None
        self.core2 = nn.Parameter(cores[1]) if tucker else None
        if init == "lycoris":
            nn.init.normal_(self.up1, std=0.1)
            nn.init.normal_(self.down1)
            nn.init.normal_(self.down2)
            nn.init.zeros_(self.up2)
        else:
            # PEFT stores `up` transposed beside a Tucker core, so that its fan-in is the rows
            for up in (self.up1, self.up2):
                uniform_fan_in_(up, shape.rows if tucker else rank)
            uniform_fan_in_(self.down1, inputs)
            nn.init.zeros_(self.down2)
        for core in cores:
            if init == "lycoris":
                nn.init.normal_(core, std=0.1)
            else:
                uniform_fan_in_(core, rank * shape.positions)

    def delta(self, weight: Tensor) -> Hadamard:
        del weight
        held = self.up1, self.down1, self.up2, self.down2, self.core1, self.core2
        return self._memo(self._hadamard, *(tensor for tensor in held if tensor is not None))

    def _hadamard(self) -> Hadamard:
        down1 = self.down1 if self.core1 is None else tucker_down(self.core1, self.down1)
        down2 = self.down2 if self.core2 is None else tucker_down(self.core2, self.down2)
        return Hadamard(times(self.scale, self.up1), down1, self.up2, down2)
