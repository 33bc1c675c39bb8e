"""Sketches of gradients: the leading singular triples of every G (m, n), and no G is kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapters.bank import bank
from peftkit.adapters.base import Adapter
from peftkit.adapters.options import factory
from peftkit.delta import Dense, LowRank
from peftkit.delta.base import Delta
from peftkit.geometry import Shape
from peftkit.training.stand_in import add_up, frozen, require_finite, require_function, require_matrices, standing_in
from peftkit.training.starts.processes import sum_over_processes
from peftkit.wrapping.installed import InstalledAdapter

#: of U(−1, 1), the distribution of the random matrices of a sketch
_VARIANCE = 1 / 3


@dataclass(frozen=True)
class Gradient:
    """G (m, n) as its sketch has it: U (m, k), S (k,), Vᵀ (k, n) in float64, and about ‖G‖².

    noise: what of `total` is in S² by the sketch alone.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    total: float
    noise: float = 0.0

    def worth(self) -> Tensor:
        """Return what each rank is worth: about σᵢ(G)² (k,), falling, to which a step lowers the loss in proportion."""
        return (self.S.square() - self.noise / len(self.S)).clamp(min=0)

    def energy(self, count: int) -> float:
        """Return about the share of ‖G‖² in the first triples."""
        return min(float(self.worth()[:count].sum()) / self.total, 1.0) if self.total > 0 else 0.0

    def alignment(self, up: Tensor, down: Tensor, *, framed: bool = False) -> float:
        """Return about the cosine of G and the first step of gradient descent from B₀ and A₀.

        The step is B₀·B₀ᵀ·G + G·A₀ᵀ·A₀, or B₀·(B₀ᵀ·G·A₀ᵀ)·A₀ where they are frames that stay.
        """
        up, down, S = up.to(self.U), down.to(self.V), self.worth().sqrt()
        left, right = (up.mT @ self.U * S) @ self.V, (self.U * S) @ (self.V @ down.mT)
        if framed:
            core = left @ down.mT
            high, wide, along = up @ core, down, core.square().sum()
        else:
            high, wide = torch.cat((up, right), 1), torch.cat((left, down))
            along = left.square().sum() + right.square().sum()
        size = float(((high.mT @ high) * (wide @ wide.mT)).sum().clamp(min=0).sqrt())
        return min(float(along) / (size * self.total**0.5), 1.0) if size and self.total > 0 else 0.0


class _Probe(Adapter):
    """An adapter that changes nothing, and whose parameters' gradients tell of the gradient G of the weight."""

    kind = "probe"

    @property
    def sketches(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.parameters())

    @abstractmethod
    def gradient(self) -> Gradient:
        """What is known of G, after the pass."""


class _Sketch(_Probe):
    """ΔW = B·Ω + Ψ·A with B = A = 0: the gradients of B and A are G·Ωᵀ and Ψᵀ·G.

    The sketch of the longer side has k rows, and that of the shorter one 2k + 1, which takes the least memory.
    """

    omega: Tensor
    psi: Tensor

    def __init__(self, shape: Shape, weight: Tensor, k: int, seed: int) -> None:
        super().__init__()
        left, right = _sizes(shape, k)
        zero = torch.zeros((), **factory(weight))  # one number in memory: only the gradients are of the full size
        self.up = nn.Parameter(zero.expand(shape.rows, left))
        self.down = nn.Parameter(zero.expand(right, shape.columns))
        self.register_buffer("omega", bank(seed, "start omega", shape.columns, left, zero).mT)
        self.register_buffer("psi", bank(seed, "start psi", shape.rows, right, zero))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(torch.cat((self.up, self.psi), dim=1), torch.cat((self.omega, self.down)))

    def gradient(self) -> Gradient:
        Y, Z = self.up.grad, self.down.grad
        assert Y is not None and Z is not None
        if Y.shape[1] < len(Z):
            return _gradient(Y.double(), Z.double(), self.psi.double())
        turned = _gradient(Z.double().mT, Y.double().mT, self.omega.double().mT)
        return Gradient(turned.V.mT, turned.S, turned.U.mT, turned.total, turned.noise)


def _sizes(shape: Shape, k: int) -> tuple[int, int]:
    """How many columns G·Ωᵀ has, and how many rows Ψᵀ·G."""
    return (2 * k + 1, k) if shape.columns > shape.rows else (k, 2 * k + 1)


def _gradient(Y: Tensor, Z: Tensor, psi: Tensor) -> Gradient:
    """G from Y = G·Ωᵀ (m, k) and Z = Ψᵀ·G (2k + 1, n): G ≈ Q·(QᵀG), as in Tropp et al., arXiv:1609.00048."""
    Q = torch.linalg.qr(Y)[0]
    core = torch.linalg.lstsq(psi.mT @ Q, Z).solution
    U, S, V = torch.linalg.svd(core, full_matrices=False)
    # what of G is outside of Q, by the equations that are left over, and what of it got into the core
    k, rows = core.shape[0], psi.shape[1]
    outside = float((Z - psi.mT @ (Q @ core)).square().sum()) / (max(rows - k, 1) * _VARIANCE)
    noise = k * outside / max(rows - k - 1, 1)
    return Gradient(Q @ U, S, V, max(float(S.square().sum()) - noise, 0.0) + outside, noise)


def _is_cheap(shape: Shape, k: int) -> bool:
    """Whether G itself takes no more than its sketch."""
    left, right = _sizes(shape, k)
    return shape.rows * shape.columns <= shape.rows * left + right * shape.columns


class _Whole(_Probe):
    """ΔW = M with M = 0: the gradient of M is G, m·n numbers."""

    def __init__(self, shape: Shape, weight: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros((), **factory(weight)).expand(shape.rows, shape.columns))

    def delta(self, weight: Tensor) -> Delta:
        del weight
        return Dense(self.matrix)

    def gradient(self) -> Gradient:
        G = self.matrix.grad
        assert G is not None
        U, S, V = torch.linalg.svd(G.double(), full_matrices=False)
        return Gradient(U, S, V, float(S.square().sum()))


def gradients_of(
    model: nn.Module,
    found: Sequence[InstalledAdapter],
    batches: Iterable[Any],
    backward: Callable[[nn.Module, Any], object] | None,
    *,
    k: Sequence[int],
    seed: int,
    whole: bool = False,
) -> tuple[list[Gradient | None], int]:
    """Return what a pass over the batches shows of the gradients, None of those that did not come, and the bytes held.

    Args:
        model: of the adapters.
        found: adapters, one for each weight to look at; none of them acts meanwhile.
        batches: what `backward` is called with.
        backward: computes a loss and calls its backward().
        k: how many singular triples of each are wanted.
        seed: of the random matrices.
        whole: keep every G itself, as is done where its sketch would take more.
    """

    def probe(index: int, at: InstalledAdapter) -> _Probe:
        shape = at.slot.geometry.shape
        if whole or _is_cheap(shape, k[index]):
            return _Whole(shape, at.base)
        return _Sketch(shape, at.base, k[index], seed)

    require_matrices(found)
    require_function(backward)
    assert backward is not None
    with frozen(model), standing_in(model, found, probe) as probes, _factored(found):
        add_up(model, batches, backward, [parameter for own in probes for parameter in own.sketches])
        missing = sum_over_processes([probe.sketches for probe in probes])
        held = sum(p.grad.nbytes for probe in probes for p in probe.sketches if p.grad is not None)
        for at, own in zip(found, probes, strict=True):
            require_finite(at, "its gradient", [p.grad for p in own.sketches if p.grad is not None])
        return [None if gone else own.gradient() for own, gone in zip(probes, missing, strict=True)], held


@contextmanager
def _factored(found: Sequence[InstalledAdapter]) -> Iterator[None]:
    """Compute by the factors of sketches, which are small, whatever route was chosen."""
    routes = {at.host.adapter_state: at.host.adapter_state.route for at in found}
    try:
        for state in routes:
            state.route = "factored"
        yield
    finally:
        for state, route in routes.items():
            state.route = route
