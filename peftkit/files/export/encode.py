"""One adapter in the words of one program: its own structure if that has it, another exact one, or ΔW baked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.adapters.base import Adapter
from peftkit.adapters.boft import BOFT
from peftkit.adapters.dora import DoRA
from peftkit.adapters.glora import GLoRA
from peftkit.adapters.ia3 import IA3
from peftkit.adapters.lokr import factorize
from peftkit.adapters.oft import OFT
from peftkit.delta import Delta, Dense, Kron, LowRank
from peftkit.delta.as_low_rank import as_low_rank
from peftkit.errors import ExportError
from peftkit.files.bind import placeholder_weight
from peftkit.files.export import forms
from peftkit.files.export.forms import (
    Additive,
    BaseProduct,
    ButterflyForm,
    ChannelScaleForm,
    Decomposition,
    Form,
    RotationForm,
)
from peftkit.files.export.programs import Target
from peftkit.geometry import Shape


@dataclass(frozen=True)
class Encoding:
    """What is written for one weight. how: "exact", "low rank" (another structure, the same ΔW on any base), "baked".

    structure: the name of what is written, form its numbers. note: what a user should know.
    """

    how: str
    structure: str
    form: Form
    note: str = ""

    @property
    def rank(self) -> int | None:
        """Of the low-rank product that is written, None for other structures."""
        delta = getattr(self.form, "inner" if isinstance(self.form, Decomposition) else "delta", None)
        return delta.rank if isinstance(delta, LowRank) else None


def form_of(adapter: Adapter, shape: Shape) -> Form:
    """The adapter's structure without its base, in fp32."""
    with torch.no_grad():
        if isinstance(adapter, DoRA):
            inner = adapter.inner.delta(placeholder_weight(shape))
            return Decomposition(inner, adapter.magnitude.detach(), "in" if adapter.columns else "out")
        if isinstance(adapter, OFT):
            rescale = None if adapter.rescale is None else adapter.rescale.detach()
            return RotationForm(adapter.generator(), rescale, adapter.side, adapter.terms)
        if isinstance(adapter, BOFT):
            return ButterflyForm(adapter.generator(), None if adapter.rescale is None else adapter.rescale.detach())
        if isinstance(adapter, IA3):
            return ChannelScaleForm(adapter.gate.detach(), "in" if adapter.columns else "out")
        if isinstance(adapter, GLoRA):
            up, base_up = adapter.up.detach() * adapter.scale, adapter.base_up.detach() * adapter.scale
            return BaseProduct(base_up, adapter.base_down.detach(), up, adapter.down.detach())
        if adapter.reads_base:
            raise ExportError(f"{adapter.kind} reads its base, and no file has a name for it: bake it with bake=True")
        return Additive(adapter.delta(placeholder_weight(shape)))


def encode(adapter: Adapter, target: Target, shape: Shape, base: Tensor | None, *, bake: bool = False) -> Encoding:
    """How a target is told of an adapter. base: W (m, n), None if it is not at hand. bake: write ΔW itself.

    Raises ExportError where there is no way, with the reason.
    """
    reason = ""
    if not (bake and adapter.reads_base):
        form = form_of(adapter, shape)
        if isinstance(form, Additive):
            return _additive(form.delta, target, shape, adapter.kind)
        structure, reason = _native(form, target, shape)
        if structure:
            law = f"{target.title}'s strength is not linear for {structure}" if structure in target.nonlinear else ""
            return Encoding("exact", structure, form, law)
    if base is None:
        raise ExportError(f"{reason or f'{adapter.kind} is to be baked'}; give the base to bake ΔW into the file")
    with torch.no_grad():
        delta = adapter.eval()(base, 1.0)
        exact_rank = isinstance(delta, LowRank) and delta.rank < min(shape.rows, shape.columns)
        baked = _additive(delta if exact_rank else Dense(delta.dense()), target, shape)
    return Encoding("baked", baked.structure, baked.form, f"{reason or 'as asked'}: holds for this base only")


def _additive(delta: Delta, target: Target, shape: Shape, kind: str = "") -> Encoding:
    structure = delta.structure
    if structure in target.reads and not target.refusal(structure, shape) and _constructible(delta, target, shape):
        return Encoding("exact" if structure == kind else "low rank", structure, Additive(delta))
    dense_size = shape.rows * shape.columns
    with torch.no_grad():
        low = as_low_rank(delta)
    fits = "lora" in target.reads and not target.refusal("lora", shape)
    if target.dense and (not fits or low.rank * sum(delta.shape) >= dense_size):
        return Encoding("low rank", "full", Additive(Dense(delta.dense())))
    if not fits:
        raise ExportError(
            target.refusal("lora", shape) or f"{target.title} has no structure for {structure or delta!r}"
        )
    return Encoding("low rank", "lora", Additive(low))


def _native(form: Form, target: Target, shape: Shape) -> tuple[str, str]:
    """The structure the target has for a form that reads its base, or why it has none."""
    if isinstance(form, Decomposition):
        inner = form.inner.structure
        why = target.refusal(inner, shape)
        if (inner, form.axis) in target.decomposes and not why and _constructible(form.inner, target, shape):
            return "dora", ""
        per = "output" if form.axis == "out" else "input channel"
        return "", why or f"{target.title} has no magnitudes per {per} around {inner or 'this adapter'}"
    if isinstance(form, RotationForm):
        structure = "oft in" if form.side == "in" else "oft" if form.rescale is None else "oft rescaled"
        if structure not in target.reads:
            return "", f"{target.title} has no OFT that rotates the {form.side} side this way"
        if form.terms is not None and structure != "oft in":
            return "", f"{target.title} solves for the rotation, this one is a series"
        if form.side == "in" and (form.rescale is not None or shape.positions > 1):
            return "", "PEFT's OFT has no factors, and its convolutions with a kernel rotate overlapping patches twice"
        if structure == "oft" and float(torch.linalg.vector_norm(form.Q)) >= forms.UNBOUNDED:
            return "", "its rotation is larger than the bound that has to be written"
        if target.name == "lycoris" and structure.startswith("oft") and form.Q.shape[1] > form.Q.shape[0]:
            return "", "LyCORIS cannot reload blocks larger than their number"
        return structure, ""
    if isinstance(form, ButterflyForm):
        if float(torch.linalg.vector_norm(form.Q)) >= forms.UNBOUNDED:
            return "", "its rotation is larger than the bound that has to be written"
        return ("boft", "") if "boft" in target.reads else ("", f"{target.title} has no BOFT of outputs")
    if isinstance(form, ChannelScaleForm):
        why = "ia3" not in target.reads and f"{target.title} has no (IA)³"
        if form.side == "out":
            why = why or target.refusal("ia3", shape)
        return ("", why) if why else ("ia3", "")
    assert isinstance(form, BaseProduct)
    layout = "glora old" if "glora old" in target.reads else "glora"
    rank, (rows, columns) = form.a1.shape[1], (shape.rows, shape.columns)
    if rank in (rows, columns):
        return "", "a GLoRA as wide as its weight can be read in two layouts"
    why = target.refusal("glora", shape) or (layout not in target.reads and f"{target.title} has no GLoRA")
    return ("", why) if why else (layout, "")


def _constructible(delta: Delta, target: Target, shape: Shape) -> bool:
    """Whether the target's own constructor makes factors of these shapes. Others take them as they come."""
    if not isinstance(delta, Kron) or target.name != "lycoris":
        return True
    (u_p, u_q), (v_p, v_d) = delta.C.shape, delta.block
    rows, channels, v_q = u_p * v_p, shape.channels, v_d // shape.positions
    if v_d % shape.positions or channels != u_q * v_q or u_p > v_p or u_q > v_q:
        return False
    # How it infers its factor from the shapes of w1 and w2
    if (u_p, u_q) == (factorize(rows, -1)[0], factorize(channels, -1)[0]):
        return True
    sizes = (max(u_p, u_q), max(v_p, v_q))
    fits = [f for f in sizes if f in (u_p, v_p) and f in (u_q, v_q)]
    factor = fits[0] if fits else min(sizes)
    return (u_p, u_q) == (_lycoris_factor(rows, factor), _lycoris_factor(channels, factor))


def _lycoris_factor(size: int, factor: int) -> int:
    """The smaller factor LyCORIS splits a size into: a divisor as it is, else the most even split below it."""
    return min(factor, size // factor) if size % factor == 0 else factorize(size, factor)[0]
