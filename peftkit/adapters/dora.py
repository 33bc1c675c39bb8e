"""DoRA: weight decomposition of any additive adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter, Stored
from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Form, PeftConfig, per_channel, per_row
from peftkit.adapters.options import require
from peftkit.delta import Decomposed, Delta, LowRank
from peftkit.delta.base import recomputed
from peftkit.geometry import Shape
from peftkit.kernels.blocks import column_sqnorms, row_sqnorms

if TYPE_CHECKING:
    from peftkit.files.export.programs import Target


@dataclass(frozen=True)
class DecompositionForm(Form):
    """Magnitudes, one per row (axis "out", (m,)) or per input channel ("in", (channels,)), around an inner ΔW."""

    inner: Delta
    magnitude: Tensor
    axis: str
    decomposed: ClassVar[bool] = True

    @property
    def lora(self) -> LowRank | None:
        return registry.additive(self.inner).lora

    def structure(self, program: Target) -> str:
        del program
        return "dora"

    def refusal(self, program: Target, shape: Shape) -> str:
        inner = registry.additive(self.inner)
        if (self.inner.structure, self.axis) in program.decomposes and not inner.refusal(program, shape):
            return ""
        per = "output" if self.axis == "out" else "input channel"
        without = f"{program.title} has no magnitudes per {per} around {self.inner.structure or 'this adapter'}"
        return program.refusal(self.inner.structure, shape) or without

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        inner = registry.additive(self.inner).tensors(program, shape, alpha)
        if program.peft_names:
            vector = per_channel(self.magnitude, shape) if shape.kernel else self.magnitude
            return inner | {"lora_magnitude_vector": vector}
        # The shape of the magnitudes tells their axis: (m, 1, …) or (1, channels, …)
        scale = per_row(self.magnitude, shape) if self.axis == "out" else per_channel(self.magnitude, shape)
        return inner | {"dora_scale": scale}

    def peft_rank(self, shape: Shape) -> int:
        return registry.additive(self.inner).peft_rank(shape)

    @classmethod
    def peft_config(cls, written: Sequence[tuple[Any, Shape]]) -> PeftConfig:
        del written
        return "LORA", {"bias": "none", "use_dora": True}


@registry.register("dora")
class DoRA(Adapter):
    r"""Decomposes the weight into magnitude and direction: W + ΔW = t·(W + V), t = μ/‖W + V‖ per row.

    V is the ΔW of an inner adapter. The parameter `magnitude`, μ (m,) or (channels,), starts at ‖W‖. ‖W + V‖² = ‖W‖² +
    2<W, V> + ‖V‖² is summed row by row from V's factors: V is never built. On another base the magnitudes count
    relative to the norms of that base, for which the norms of the first base are kept.

    Paper: https://arxiv.org/abs/2402.09353.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device, its dtype and its norms.
        inner: The kind of the inner adapter, "lora" by default; any kind that does not read its base.
        axis: "out" (default) normalises rows, one per output, as the paper's code, PEFT and LyCORIS do; "in" normalises
            over each input channel (LyCORIS wd_on_out=False).
        detach_norm: Hold ‖W + V‖ constant in the gradient (§4.3 of the paper), True by default.
        **inner_options: Options of the inner adapter.

    Raises:
        OptionError: An option has a value that it cannot take, or the inner adapter reads its base.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "dora", rank=4)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # LoRA's and one magnitude per row
        104
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.09353"
    facts: ClassVar[Facts] = Facts(
        "scales",
        "t·(W + γ·B·A) − W, t = μ/‖W + γ·B·A‖",
        "LoRA falls short of full fine-tuning, and memory for one more output a layer is there",
        peft="LoraConfig(use_dora=True)",
        lycoris="lora with weight_decompose",
    )
    convention: ClassVar[str] = "magnitude/base_norm*norm(W)/norm(W+V)*(W+V)-W"
    reads_base = True
    resizable: ClassVar[frozenset[str]] = frozenset({"detach_norm"})
    from_base: ClassVar[tuple[str, ...]] = ("base_norm",)
    on_another_base: ClassVar[str] = "keeps its magnitudes relative to the norms of the new base"

    base_norm: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        inner: str = "lora",
        axis: str = "out",
        detach_norm: bool = True,
        **inner_options: Any,
    ) -> None:
        super().__init__()
        require(axis in ("out", "in"), "dora", "axis", axis, "'out' (rows) or 'in' (input channels)")
        additive = [k for k in registry.kinds() if not registry.get(k).reads_base]
        require(registry.get(inner).kind in additive, "dora", "inner", inner, f"one of {', '.join(additive)}")
        self.inner = registry.build(inner, shape, weight, **inner_options)
        require(not self.inner.reads_base, "dora", "rows", inner_options.get("rows"), "None: no rows that replace W's")
        self.options = {"inner": self.inner.kind, **self.inner.options}
        self.input_dropout, self.projects = self.inner.input_dropout, self.inner.projects
        self.starts_at_zero = frozenset(f"inner.{name}" for name in self.inner.starts_at_zero)
        self.decays = frozenset(f"inner.{name}" for name in self.inner.decays)
        self.columns, self.detach_norm, self.positions = axis == "in", detach_norm, shape.positions
        norm = self._per_scale(self._base_sqnorms(weight)).sqrt()
        self.magnitude = nn.Parameter(norm.clone())
        self.register_buffer("base_norm", norm)

    @classmethod
    def of_rows(cls, stored: Stored, shape: Shape, rows: Tensor) -> Stored | None:
        options, own = stored.options, ("inner", "axis", "detach_norm")
        if options["axis"] != "out":
            return None
        inner = Stored(
            options["inner"],
            {name: value for name, value in options.items() if name not in own},
            {key.removeprefix("inner."): t for key, t in stored.tensors.items() if key.startswith("inner.")},
        )
        taken = registry.get(inner.kind).of_rows(inner, shape, rows)
        if taken is None:
            return None
        kept = {name: options[name] for name in own if name in options} | {"inner": taken.kind, **taken.options}
        tensors = {key: t[rows] for key, t in stored.tensors.items() if not key.startswith("inner.")}
        return Stored(stored.kind, kept, tensors | {f"inner.{key}": t for key, t in taken.tensors.items()})

    def delta(self, weight: Tensor) -> Decomposed:
        # Called, as hooks may load its parameters; a plan asks one without values for the shape of its ΔW
        V = self.inner.delta(weight) if self.inner.unset else self.inner(weight, 1.0)
        own = self._base_sqnorms(weight)
        if self.detach_norm:
            with torch.no_grad():
                moments = V.column_moments(weight) if self.columns else V.moments(weight)
            cross, squares = (moment.detach() for moment in moments)  # to forward-mode AD too
        else:  # the norm takes part in the gradient, but nothing of the size of W waits for it
            cross, squares = recomputed(lambda W: self._moments(V, W), weight, lambda: V.factors)
        # t = m/‖W + V‖ is (1 + a)·(1 + b) with 1 + a = m/‖W‖ and 1 + b = ‖W‖/‖W + V‖ on the norms of the base it was
        # made on and of this one. Both are made without 1, which their digits would be lost to, and are 0 at the start
        a = _quotient(self.magnitude - self.base_norm, self.base_norm)
        change, square = self._per_scale(2 * cross + squares), self._per_scale(own)
        norm = _root((square + change).clamp(min=0))
        b = _quotient(-change, norm * (square.sqrt() + norm))
        e = a + b + a * b
        if self.columns:
            e = e.repeat_interleave(self.positions)
        return Decomposed(e, 1 + e, weight, V, self.columns, (own, cross, squares))

    def form(self, weight: Tensor) -> DecompositionForm:
        axis = "in" if self.columns else "out"
        return DecompositionForm(self.inner.delta(weight), self.magnitude.detach(), axis)

    @classmethod
    def structure(cls, options: Mapping[str, Any]) -> str:
        return f"dora {options['inner']} {options['axis']}"

    def project_(self) -> None:
        self.inner.project_()

    def rebase_(self, weight: Tensor) -> None:
        self.inner.rebase_(weight)

    def derived(self) -> dict[str, Tensor]:
        return {f"inner.{key}": tensor for key, tensor in self.inner.derived().items()}

    def _base_sqnorms(self, weight: Tensor) -> Tensor:
        """‖W_i‖² per row (m,), or per column (n,).

        Read from W at every call: nothing that is kept beside W would know of every way there is to write to it.
        """
        with torch.no_grad():  # no decorator: torch.compile follows none on the view of one expert
            return column_sqnorms(weight) if self.columns else row_sqnorms(weight)

    def _moments(self, V: Delta, weight: Tensor) -> Tensor:
        """<W_i, V_i> and ‖V_i‖² per row (2, m), or per column (2, n)."""
        return torch.stack(V.column_moments(weight) if self.columns else V.moments(weight))

    def _per_scale(self, v: Tensor) -> Tensor:
        """Columns summed over the kernel positions of their channel."""
        return v.unflatten(0, (-1, self.positions)).sum(1) if self.columns else v


def _root(square: Tensor) -> Tensor:
    """√square, with gradient 0 at 0."""
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator/denominator, and 0 where the denominator is 0: a row of zeros has no direction to scale."""
    zero = denominator == 0
    return (numerator / denominator.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
