"""Forms: an adapter as files see it, its structure without its base, and the tensors a file writes for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank
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


def side_by_side(blocks: Sequence[tuple[LowRank | None, int, bool]], columns: int) -> LowRank:
    """ΔW of a layer fused of others, row block under row block: rank Σ r.

    blocks: ΔW or None, its rows, and whether its halves change places.
    """
    found = []
    for low, rows, swapped in blocks:
        if low is None:
            low = LowRank(torch.zeros(rows, 0), torch.zeros(0, columns))
        found.append(LowRank(low.B.roll(rows // 2, 0), low.A) if swapped else low)
    return LowRank(torch.block_diag(*(low.B for low in found)), torch.cat([low.A for low in found]))


def low_rank(delta: Delta) -> LowRank:
    """The same ΔW as one product B·A: by its structure, or as ΔW times the identity where that is smaller."""
    m, n = delta.shape
    if isinstance(delta, Hadamard) and delta.rank**2 < min(m, n):
        return delta.khatri_rao
    if isinstance(delta, Kron):
        found = _kron_low_rank(delta)
        if found.rank < min(m, n):
            return found
    if isinstance(delta, LowRank) and delta.rank <= min(m, n):
        return delta
    return of_matrix(delta.dense())


def of_matrix(M: Tensor) -> LowRank:
    """M (m, n) as M·I or I·M, exact at full rank."""
    identity = torch.eye(min(M.shape), dtype=M.dtype, device=M.device)
    return LowRank(M, identity) if M.shape[1] <= M.shape[0] else LowRank(identity, M)


def _kron_low_rank(delta: Kron) -> LowRank:
    """(C ⊗ B)(I ⊗ A) of rank c·r, or (I ⊗ B)(C ⊗ A) of rank a·r, whichever is smaller; D = B·A, or I·D, or D·I."""
    if delta.left is not None:
        B, A = delta.left, delta.right
    else:
        D = of_matrix(delta.right)
        B, A = D.B, D.A
    (a, c), C = delta.C.shape, delta.C.contiguous()
    I_c, I_a = (torch.eye(size, dtype=C.dtype, device=C.device) for size in (c, a))
    B, A = B.contiguous(), A.contiguous()
    if c <= a:
        return LowRank(torch.kron(C, B), torch.kron(I_c, A))
    return LowRank(torch.kron(I_a, B), torch.kron(C, A))


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


def balanced(delta: LowRank) -> LowRank:
    """The same product with the norms of B's columns and A's rows alike, which is what narrow dtypes hold best."""
    up, down = torch.linalg.vector_norm(delta.B, dim=0), torch.linalg.vector_norm(delta.A, dim=1)
    live = (up > 0) & (down > 0)
    by = torch.where(live, (down / up.masked_fill(~live, 1.0)).sqrt(), torch.ones_like(up))
    by = by.masked_fill(by == 0, 1.0)
    return LowRank(delta.B * by, delta.A / by[:, None])
