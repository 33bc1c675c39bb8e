"""Adapters by hand, each with its ΔW by one formula.

They are of small multiples of 1/8: their products and sums are exact in fp32, so that what a formula gives in one line
here must come out bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.files import State


def exact(*shape: int, seed: int = 0, span: int = 4) -> Tensor:
    """Multiples of 1/8 within ±span/8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, shape, generator=generator).float() / 8


@dataclass(frozen=True)
class Hand:
    """A module's tensors as kohya and LyCORIS name them, and its ΔW (rows, columns) on a weight by one formula."""

    tensors: State
    delta: Callable[[Tensor], Tensor]  # W (rows, columns), in fp64 -> ΔW

    def keyed(self, module: str) -> State:
        return {f"{module}.{name}": tensor for name, tensor in self.tensors.items()}


def lora(rows: int, columns: int, rank: int = 2, seed: int = 0, alpha: float = 1.0) -> Hand:
    up, down = exact(rows, rank, seed=seed), exact(rank, columns, seed=seed + 1)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
    return Hand(tensors, lambda W: up.double() @ down.double() * alpha / rank)


def loha(rows: int, columns: int, rank: int = 2, seed: int = 0) -> Hand:
    a1, a2 = exact(rows, rank, seed=seed), exact(rows, rank, seed=seed + 1)
    b1, b2 = exact(rank, columns, seed=seed + 2), exact(rank, columns, seed=seed + 3)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    return Hand(tensors, lambda W: (a1.double() @ b1.double()) * (a2.double() @ b2.double()) / rank)


def lokr(rows: int, columns: int, outer: tuple[int, int] = (2, 2), seed: int = 0) -> Hand:
    C, D = exact(*outer, seed=seed), exact(rows // outer[0], columns // outer[1], seed=seed + 1)
    tensors = {"lokr_w1": C, "lokr_w2": D, "alpha": torch.tensor(1.0)}
    return Hand(tensors, lambda W: torch.kron(C.double(), D.double()))


def full(rows: int, columns: int, seed: int = 0) -> Hand:
    diff = exact(rows, columns, seed=seed)
    return Hand({"diff": diff}, lambda W: diff.double())


def dora_out(rows: int, columns: int, rank: int = 2, seed: int = 0) -> Hand:
    """m/‖W + V‖·(W + V) − W, row by row, with any magnitudes."""
    inner, magnitude = lora(rows, columns, rank, seed), 1 + exact(rows, 1, seed=seed + 7)

    def delta(W: Tensor) -> Tensor:
        V = W + inner.delta(W)
        return magnitude.double() / V.norm(dim=1, keepdim=True) * V - W

    return Hand({**inner.tensors, "dora_scale": magnitude}, delta)


HANDS: dict[str, Callable[..., Hand]] = {"lora": lora, "loha": loha, "lokr": lokr, "full": full, "dora out": dora_out}


def matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def hand_merge(base: Mapping[str, Tensor], hands: Mapping[str, Sequence[tuple[Hand, float]]]) -> State:
    """W + Σ λ·ΔW(W) in fp64, rounded to fp32 and then to the weight's dtype. hands: by key of the base."""
    out = dict(base)
    for key, added in hands.items():
        W = base[key].double().flatten(1)
        total = W + sum(strength * hand.delta(W) for hand, strength in added)
        out[key] = total.float().to(base[key].dtype).reshape(base[key].shape)
    return out


def lycoris_tensors(hands: Mapping[str, Hand]) -> State:
    """A file of LyCORIS' generic wrapper."""
    return {
        key: t for name, hand in hands.items() for key, t in hand.keyed(f"lycoris_{name.replace('.', '_')}").items()
    }
