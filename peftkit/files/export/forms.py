"""Forms: an adapter as files see it, its structure without its base, and the tensors a file writes for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank
from peftkit.delta.as_low_rank import of_matrix
from peftkit.geometry import Shape

#: OFT's alpha bounds ‖Q‖: one that no loader ever reaches, where 0 means "none" to some and "nothing" to others
UNBOUNDED = 1000.0


@dataclass(frozen=True)
class Additive:
    """ΔW itself, the same on any base."""

    delta: Delta


@dataclass(frozen=True)
class Decomposition:
    """DoRA: magnitudes, one per row (axis "out", (m,)) or per input channel ("in", (channels,)), around an inner ΔW."""

    inner: Delta
    magnitude: Tensor
    axis: str


@dataclass(frozen=True)
class RotationForm:
    """OFT: skew blocks Q (k, b, b), a factor per rotated coordinate or None, and what is rotated: "out" or "in".

    terms: of the series that stands for the Cayley transform, None for the transform itself.
    """

    Q: Tensor
    rescale: Tensor | None
    side: str
    terms: int | None


@dataclass(frozen=True)
class ButterflyForm:
    """BOFT: skew blocks Q (t, k, b, b) of every stage, and a factor per output or None."""

    Q: Tensor
    rescale: Tensor | None


@dataclass(frozen=True)
class ChannelScaleForm:
    """(IA)³: w, with ΔW = w·W over rows ("out") or input channels ("in")."""

    gate: Tensor
    side: str


@dataclass(frozen=True)
class BaseProduct:
    """GLoRA: ΔW = W·a1·a2 + b1·b2."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor


Form = Additive | Decomposition | RotationForm | ButterflyForm | ChannelScaleForm | BaseProduct


# -- the tensors of one module, as kohya, LyCORIS and the WebUIs name them --------------------------------------------


def lora(delta: LowRank, shape: Shape, alpha: float) -> dict[str, Tensor]:
    """B·A under a given alpha: what α/r leaves over is folded into `lora_up`."""
    ones = (1,) * len(shape.kernel)
    return {
        "lora_up.weight": (delta.B * (delta.rank / alpha)).reshape(*delta.B.shape, *ones),
        "lora_down.weight": delta.A.reshape(delta.rank, shape.channels, *shape.kernel),
        "alpha": torch.tensor(float(alpha)),
    }


def loha(delta: Hadamard) -> dict[str, Tensor]:
    """Under alpha = rank: LyCORIS' merge would apply any other scale twice."""
    factors = {"w1_a": delta.B1, "w1_b": delta.A1, "w2_a": delta.B2, "w2_b": delta.A2}
    return {**{f"hada_{name}": t for name, t in factors.items()}, "alpha": torch.tensor(float(delta.rank))}


def lokr(delta: Kron, shape: Shape, *, full: bool) -> dict[str, Tensor]:
    """Under alpha = rank, as LoHa. full: write D whole; else as two factors, D·I if it has none."""
    if full:
        block = delta.D.reshape(delta.block[0], -1, *shape.kernel)
        return {"lokr_w1": delta.C, "lokr_w2": block, "alpha": torch.tensor(1.0)}
    factors = of_matrix(delta.right) if delta.left is None else LowRank(delta.left, delta.right)
    rank = torch.tensor(float(factors.rank))
    return {"lokr_w1": delta.C, "lokr_w2_a": factors.B, "lokr_w2_b": factors.A, "alpha": rank}


def diff(delta: Dense, shape: Shape) -> dict[str, Tensor]:
    return {"diff": delta.dense().reshape(shape.rows, shape.channels, *shape.kernel)}


def oft(turn: RotationForm, shape: Shape) -> dict[str, Tensor]:
    """Blocks A with Q = Aᵀ − A, because kohya and LyCORIS apply Rᵀ."""
    tensors = {"oft_blocks": -turn.Q.triu(1), "alpha": torch.tensor(UNBOUNDED)}
    if turn.rescale is not None:
        tensors["rescale"] = turn.rescale.reshape(-1, 1, *(1,) * len(shape.kernel))
    return tensors


def skew(turn: RotationForm) -> Tensor:
    """oft_R of a rotation of the input: the upper triangles of Q, or of −Q for the exact one, which PEFT inverts."""
    i, j = torch.triu_indices(turn.Q.shape[1], turn.Q.shape[1], 1)
    upper = turn.Q[:, i, j]
    return upper if turn.terms is not None else -upper


def boft(stages: ButterflyForm, shape: Shape) -> dict[str, Tensor]:
    """Blocks A with Q = A − Aᵀ. LyCORIS reads all stages there can be: those that are missing turn nothing."""
    blocks = stages.Q.triu(1)
    missing = blocks.shape[1].bit_length() - len(blocks)
    blocks = torch.cat([blocks, blocks.new_zeros(missing, *blocks.shape[1:])])
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(UNBOUNDED)}
    if stages.rescale is not None:
        tensors["rescale"] = stages.rescale.reshape(-1, 1, *(1,) * len(shape.kernel))
    return tensors


def ia3(gate: ChannelScaleForm, shape: Shape) -> dict[str, Tensor]:
    on_input = gate.side == "in"
    vector = gate.gate.reshape(1, -1, *(1,) * len(shape.kernel)) if shape.kernel else gate.gate
    return {"weight": vector, "on_input": torch.tensor(int(on_input))}


def glora(product: BaseProduct, shape: Shape, *, old_layout: bool) -> dict[str, Tensor]:
    """Under alpha = rank, because A1111, whose layout is the old one, ignores it."""
    a1, a2, b1, b2 = product.a1, product.a2, product.b1, product.b2
    if old_layout:
        a1, a2, b1, b2 = a2, a1, b2, b1
    ones = (1,) * len(shape.kernel)
    factors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    factors = {name: factor.reshape(*factor.shape, *ones) for name, factor in factors.items()}
    return {**factors, "alpha": torch.tensor(float(product.a1.shape[1]))}


def dora_scale(form: Decomposition, shape: Shape) -> Tensor:
    """The magnitudes in the shape that tells their axis: (m, 1, …) or (1, channels, …)."""
    ones = (1,) * len(shape.kernel)
    return form.magnitude.reshape((-1, 1, *ones) if form.axis == "out" else (1, -1, *ones))
