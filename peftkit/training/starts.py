"""Starts that are made of data: factors of the gradient, or of the inputs, that training begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapters.bank import bank
from peftkit.adapters.base import Adapter
from peftkit.adapters.options import factory
from peftkit.delta import LowRank
from peftkit.errors import OptionError, require_choice, require_integer
from peftkit.geometry import Shape
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters

#: of U(−1, 1), the distribution of the random matrices of a sketch
_VARIANCE = 1 / 3
#: LoRA-GA's stability: the size of the start is m^¼/√_STABLE
_STABLE = 16.0


@dataclass(frozen=True)
class StartReport:
    """What a start found.

    Attributes:
        how: the start.
        energy: module -> the share of ‖G‖², or of the inputs' energy, in the directions that the start takes. The first
            step of gradient descent from LoRA-GA's start has the cosine √energy with the full gradient.
        extra_bytes: what the pass held beside the model and its activations.
    """

    how: str
    energy: Mapping[str, float]
    extra_bytes: int

    def __str__(self) -> str:
        shares = sorted(self.energy.values())
        return (
            f"{self.how} on {len(shares)} modules: {100 * shares[0]:.0f} to {100 * shares[-1]:.0f} % of the energy, "
            f"{self.extra_bytes / 1e6:.3g} MB beside the model"
        )


class _Probe(Adapter):
    """ΔW = B·Ω + Ψ·A with B = A = 0, which changes nothing: the gradients of B and A are G·Ωᵀ and Ψᵀ·G.

    These are two sketches of the gradient G (m, n) of the weight: k numbers a row, and 2k + 1 a column.
    """

    kind = "probe"
    omega: Tensor
    psi: Tensor

    def __init__(self, shape: Shape, weight: Tensor, k: int, seed: int) -> None:
        super().__init__()
        zero = torch.zeros((), **factory(weight))  # one number in memory: only the gradients are of the full size
        self.up = nn.Parameter(zero.expand(shape.rows, k))
        self.down = nn.Parameter(zero.expand(2 * k + 1, shape.columns))
        self.register_buffer("omega", bank(seed, "start omega", shape.columns, k, zero).mT)
        self.register_buffer("psi", bank(seed, "start psi", shape.rows, 2 * k + 1, zero))

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        return LowRank(torch.cat((self.up, self.psi), dim=1), torch.cat((self.omega, self.down)))

    def leading(self, count: int) -> tuple[Tensor, Tensor, float]:
        """The leading singular vectors of G, U (m, count) and Vᵀ, and about the share of ‖G‖² that is theirs."""
        Y, Z = self.up.grad, self.down.grad
        assert Y is not None and Z is not None
        Y, Z, psi = Y.double(), Z.double(), self.psi.double()
        Q = torch.linalg.qr(Y)[0]
        core = torch.linalg.lstsq(psi.mT @ Q, Z).solution  # of G ≈ Q·(QᵀG), as in Tropp et al., arXiv:1609.00048
        U, S, V = torch.linalg.svd(core, full_matrices=False)
        # what of G is outside of Q, by the equations that are left over, and what of it got into the core
        k, rows = core.shape[0], psi.shape[1]
        outside = float((Z - psi.mT @ (Q @ core)).square().sum()) / (max(rows - k, 1) * _VARIANCE)
        noise = k * outside / max(rows - k - 1, 1)
        total = float(S.square().sum()) - noise + outside
        taken = float(S[:count].square().sum()) - noise * count / k
        return (Q @ U)[:, :count], V[:count], min(max(taken / total, 0.0), 1.0) if total > 0 else 0.0


def start(
    model: nn.Module,
    how: str,
    batches: Iterable[Any],
    backward: Callable[[nn.Module, Any], object] | None = None,
    *,
    name: str | None = None,
    oversample: int = 4,
    seed: int = 0,
) -> StartReport:
    r"""Give adapters the start that some batches of data show to be a good one; ΔW stays exactly 0.

    Call it after `wrap` and before training. "lora-ga" takes the leading 2r singular triples of the gradient G of each
    weight over the batches, B₀ = c·U_{r:2r} and A₀ = c·V_{:r}ᵀ with c = m^¼/4, so that the first step of training goes
    along the best step that a matrix of rank 2r can take (https://arxiv.org/abs/2407.05000). "eva" takes the leading r
    right singular vectors of the layer's inputs, with B₀ = 0 (https://arxiv.org/abs/2410.07170; not centred).

    No gradient of a weight is kept: a sketch of (m + 2n)·k numbers a layer is, k = oversample·r, for every layer that
    can be adapted. The base is never written. In a group of processes the sketches are summed over all of them, each
    with its own batches: every process gets the same start.

    Args:
        model: wrapped with adapters of the kind "anchored" and start="given".
        how: "lora-ga" or "eva".
        batches: what `backward` is called with, one after another.
        backward: called as backward(model, batch), it computes a loss and calls its backward(). "eva" needs no
            backward, and by default calls the model with the batch.
        name: of the adapters; by default all.
        oversample: k/r, 4 by default and at least 2.
        seed: of the random matrices of the sketch.

    Returns:
        How much of the energy the start has of each layer, and the memory it took.

    Raises:
        OptionError: an option has a value it cannot take, an adapter takes no start, or no gradient came to a layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        >>> _ = pk.wrap(model, "anchored", rank=2, start="given")
        >>> batches = [torch.randn(8, 16) for _ in range(4)]
        >>> report = pk.start(model, "lora-ga", batches, lambda m, x: m(x).square().mean().backward())
        >>> sorted(report.energy)
        ['0', '2']
    """
    require_choice("how", how, ("lora-ga", "eva"))
    require_integer("oversample", oversample, 2, "an integer")
    found = list(installed_adapters(model, None if name is None else [name]))
    without = [at for at in found if not type(at.adapter).takes_start or at.adapter.derived()]
    if without or not found:
        which = without[0].site or "the model" if found else "the model"
        raise OptionError(
            f"{which}: {without[0].adapter.kind if without else 'no adapter'} takes no start from data: wrap with the "
            "kind 'anchored' and start='given'"
        )
    if how == "eva":
        return _of_inputs(model, found, batches, backward, oversample, seed)
    if backward is None:
        raise OptionError("backward=None was given, and lora-ga needs the gradients of a loss: pass a function")
    with _probing(model, found, oversample, seed) as probes:
        for batch in batches:
            backward(model, batch)
        energy: dict[str, float] = {}
        _sum_over_processes([grad for _, each in probes for grad in (each.up.grad, each.down.grad)])
        for at, probe in probes:
            if probe.up.grad is None or probe.down.grad is None:
                raise OptionError(f"{at.site or 'the model'}: no gradient came to it: give batches, and a loss of it")
            rank = at.adapter.options["rank"]
            U, V, energy[at.site] = probe.leading(2 * rank)
            size = at.slot.geometry.shape.rows**0.25 / _STABLE**0.5
            at.adapter.anchor_(size * U[:, rank:], size * V[:rank])
        used = sum(grad.nbytes for _, probe in probes for grad in (probe.up.grad, probe.down.grad) if grad is not None)
    return StartReport(how, energy, used)


@contextmanager
def _probing(
    model: nn.Module, found: Sequence[InstalledAdapter], oversample: int, seed: int
) -> Iterator[list[tuple[InstalledAdapter, _Probe]]]:
    """Put probes in the places of adapters, and let nothing else have gradients."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    routes = {at.host: at.host.adapter_state.route for at in found}
    probes: list[tuple[InstalledAdapter, _Probe]] = []
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for at in found:
            shape = at.slot.geometry.shape
            probe = _Probe(shape, at.base, oversample * at.adapter.options["rank"], seed)
            at.put_(probe)
            at.host.adapter_state.route = "factored"
            probes.append((at, probe))
        yield probes
    finally:
        for at, _ in probes:
            at.put_(at.adapter)
        for host, route in routes.items():
            host.adapter_state.route = route
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Add to no gradient that is there: each parameter has its own again afterwards."""
    held = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for parameter in held:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in held.items():
            parameter.grad = grad


def _sum_over_processes(sketches: Sequence[Tensor | None]) -> None:
    """Give every process of a group the sums of all: a sketch of the data of all is the sum of their sketches."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for sketch in sketches:
            if sketch is not None:
                torch.distributed.all_reduce(sketch)


def _called(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _of_inputs(
    model: nn.Module,
    found: Sequence[InstalledAdapter],
    batches: Iterable[Any],
    backward: Callable[[nn.Module, Any], object] | None,
    oversample: int,
    seed: int,
) -> StartReport:
    """EVA: Ω·C of the inputs' second moment C (n, n), whose leading right singular vectors are those of the inputs."""
    read = next((at for at in found if at.slot.parameter in at.host.adapter_state.reads), None)
    if read is not None:
        raise OptionError(
            f"{read.site}: its weight is read by its module, so that its inputs are not seen: use lora-ga"
        )
    sketches: dict[int, tuple[Tensor, Tensor]] = {}
    squares = [torch.zeros((), dtype=torch.float64) for _ in found]

    def seen(index: int, at: InstalledAdapter) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        geometry = at.slot.geometry
        omega = bank(
            seed,
            "start omega",
            geometry.shape.columns,
            oversample * at.adapter.options["rank"],
            at.base.new_zeros((), dtype=torch.float32),
        ).mT

        def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            x = (args[0] if args else options["input"]).detach().to(omega.dtype)
            with torch.enable_grad():
                A = omega.clone().requires_grad_()
                h = geometry.contract(x, A)
                (sketch,) = torch.autograd.grad(h, A, h.detach())
            before = sketches.get(index, (0, 0))[0]
            sketches[index] = before + sketch, omega
            squares[index] += (omega * sketch).sum().double().cpu() / (_VARIANCE * len(omega))

        return hook

    handles = [at.host.register_forward_pre_hook(seen(index, at), with_kwargs=True) for index, at in enumerate(found)]
    try:
        with _gradients_kept(model), torch.set_grad_enabled(backward is not None):
            for batch in batches:
                (backward or _called)(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    _sum_over_processes([*(sketches.get(index, (None,))[0] for index in range(len(found))), *squares])
    energy: dict[str, float] = {}
    for index, at in enumerate(found):
        if index not in sketches:
            raise OptionError(f"{at.site or 'the model'}: it was not called: give batches")
        rank = at.adapter.options["rank"]
        V, values = _nystrom(*sketches[index])
        at.adapter.anchor_(V.new_zeros(at.slot.geometry.shape.rows, rank), V[:rank])
        energy[at.site] = min(1.0, float(values[:rank].sum() / squares[index])) if squares[index] else 0.0
    return StartReport("eva", energy, sum(sketch.nbytes for sketch, _ in sketches.values()))


def _nystrom(sketch: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (k, n) and eigenvalues (k,) of C (n, n), the largest first, from Ω·C (k, n) and Ω (k, n).

    C ≈ (ΩC)ᵀ·(ΩCΩᵀ)⁺·(ΩC), as in Tropp et al., https://arxiv.org/abs/1706.05736.
    """
    Y, core = sketch.double(), sketch.double() @ omega.double().mT
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values > 1e-12 * values[-1].clamp(min=1e-300)
    root = (vectors * torch.where(kept, values, 1.0).rsqrt() * kept).mT @ Y
    _, S, V = torch.linalg.svd(root, full_matrices=False)
    return V, S.square()
