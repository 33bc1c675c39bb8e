"""(IA)³: a gain for every output or input channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Form, first_reason, per_channel
from peftkit.adapters.options import factory, require
from peftkit.adapters.registry import register
from peftkit.delta import ChannelScale
from peftkit.geometry import Shape

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


@dataclass(frozen=True)
class ChannelScaleForm(Form):
    """w, with ΔW = w·W over rows (side "out") or input channels ("in"), as the tensors "weight" and "on_input"."""

    gate: Tensor
    side: str

    def structure(self, program: Target) -> str:
        del program
        return "ia3"

    def refusal(self, program: Target, shape: Shape) -> str:
        unknown = first_reason(("ia3" not in program.reads, f"{program.title} has no (IA)³"))
        return unknown or (program.refusal("ia3", shape) if self.side == "out" else "")

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        del program, alpha
        vector = per_channel(self.gate, shape) if shape.kernel else self.gate
        return {"weight": vector, "on_input": torch.tensor(int(self.side == "in"))}


@register("ia3")
class IA3(Adapter):
    """Scales channels: ΔW = diag(w)·W over outputs, or W·diag(w) over input channels.

    The parameter `gate`, w = l − 1, (m,) or (channels,), starts at 0. The bias stays as it is, as in LyCORIS; PEFT
    scales it too on side "out".

    Paper: https://arxiv.org/abs/2205.05638.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        side: "out" (default) scales output channels, "in" input channels.

    Raises:
        OptionError: `side` is neither.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "ia3")
        >>> sum(p.numel() for p in pk.adapter_parameters(model))
        8
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2205.05638"
    facts: ClassVar[Facts] = Facts("scales", "diag(w)·W", "one gain a channel must do", peft="IA3Config", lycoris="ia3")
    convention: ClassVar[str] = "gate*W"
    scaling_parameters: ClassVar[frozenset[str]] = frozenset({"gate"})
    reads_base = True
    on_another_base: ClassVar[str] = "scales the channels of the new base"

    def __init__(self, shape: Shape, weight: Tensor, *, side: str = "out") -> None:
        super().__init__()
        require(side in ("out", "in"), "ia3", "side", side, "'out' or 'in'")
        self.columns, self.positions = side == "in", shape.positions
        self.gate = nn.Parameter(torch.zeros(shape.channels if self.columns else shape.rows, **factory(weight)))

    @classmethod
    def row_parameters(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"gate"} if options.get("side", "out") == "out" else ())

    def delta(self, weight: Tensor) -> ChannelScale:
        gate = self.gate.repeat_interleave(self.positions) if self.columns else self.gate
        return ChannelScale(gate, weight, self.columns)

    def form(self, weight: Tensor) -> ChannelScaleForm:
        del weight
        return ChannelScaleForm(self.gate.detach(), "in" if self.columns else "out")
