"""Sketches of inputs: the leading eigenvectors of every second moment C = Σ x·xᵀ (n, n), and no C is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapters.bank import bank
from peftkit.errors import OptionError
from peftkit.kernels.torch_private import uncompiled
from peftkit.training.stand_in import everywhere, kept, require_finite, require_gradients
from peftkit.training.starts.processes import sum_over_processes
from peftkit.wrapping.installed import InstalledAdapter


@dataclass(frozen=True)
class Inputs:
    """C (n, n) as its sketch has it: eigenvectors Vᵀ (k, n), values (k,), falling, in float64, and its trace."""

    V: Tensor
    values: Tensor
    total: float

    def worth(self) -> Tensor:
        """Return what each rank is worth: the share of the inputs that is in its direction."""
        return self.values / (self.total or 1.0)

    def energy(self, count: int) -> float:
        """Return about the share of the inputs' energy in the first directions."""
        return min(float(self.values[:count].sum()) / self.total, 1.0) if self.total > 0 else 0.0


class _Held(nn.Module):
    """Ω·C (k, n) and Σ‖x‖², as gradients of parameters, which is what processes sum."""

    omega: Tensor

    def __init__(self, at: InstalledAdapter, k: int, seed: int) -> None:
        super().__init__()
        like = at.base.new_zeros((), dtype=torch.float32)
        columns = at.slot.geometry.shape.columns
        self.register_buffer("omega", bank(seed, "start omega", columns, k, like).mT)
        self.sketch = nn.Parameter(like.expand(k, columns))
        self.squares = nn.Parameter(like)

    def see(self, at: InstalledAdapter, input: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the inputs of one call, in single precision also under autocast."""
        geometry = at.slot.geometry.sized_for(at.host, input, *args, **kwargs)
        x = input.detach().to(self.omega.dtype)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            A = self.omega.clone().requires_grad_()
            h = geometry.contract(x, A)
            (seen,) = torch.autograd.grad(h, A, h.detach())
            squares = geometry.contract(x.square(), torch.ones_like(self.omega[:1])).sum()
        for own, new in ((self.sketch, seen), (self.squares, squares)):
            own.grad = new if own.grad is None else own.grad + new

    def inputs(self) -> Inputs:
        assert self.sketch.grad is not None and self.squares.grad is not None
        return _nystrom(self.sketch.grad.double(), self.omega.double(), float(self.squares.grad))


def inputs_of(
    model: nn.Module,
    found: Sequence[InstalledAdapter],
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], object] | None,
    *,
    k: Sequence[int],
    seed: int,
) -> tuple[list[Inputs | None], int]:
    """Return what a pass over the batches shows of the inputs, None of layers that were not called, and the bytes held.

    Args:
        model: of the adapters.
        found: adapters, one for each weight to look at.
        batches: what `call` is called with.
        call: calls the model; by default model(batch), with a tuple's or a mapping's elements as arguments.
        k: how many directions of each are wanted.
        seed: of the random matrices.
    """
    require_gradients()
    places = everywhere(model, found)
    for at in itertools.chain(*places):
        _require_seen(at)
    held = [_Held(at, own, seed) for at, own in zip(found, k, strict=True)]
    with kept(model), _seeing(places, held), uncompiled(), torch.set_grad_enabled(call is not None):
        for batch in batches:
            (call or called)(model, batch)
    missing = sum_over_processes([[own.sketch, own.squares] for own in held])
    for at, own in zip(found, held, strict=True):
        require_finite(at, "its input", [p.grad for p in (own.sketch, own.squares) if p.grad is not None])
    seen = [None if gone else own.inputs() for own, gone in zip(held, missing, strict=True)]
    return seen, sum(own.sketch.nbytes for own in held)


def _require_seen(at: InstalledAdapter) -> None:
    """Raise OptionError for a weight that no input is multiplied with."""
    at.require_values()
    where, instead = at.site or "the model", "use a start that is made of gradients, as lora-ga"
    if at.slot.parameter in at.host.adapter_state.reads:
        raise OptionError(f"{where}: its weight is read by its module, so that its inputs are not seen: {instead}")
    if at.looks_up:
        raise OptionError(f"{where} is an embedding, whose input is numbers of rows, with no directions: {instead}")


@contextmanager
def _seeing(places: Sequence[Sequence[InstalledAdapter]], held: Sequence[_Held]) -> Iterator[None]:
    def hook(at: InstalledAdapter, own: _Held) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, options: own.see(at, *args, **options)

    handles = [
        at.host.register_forward_pre_hook(hook(at, own), with_kwargs=True)
        for of_one, own in zip(places, held, strict=True)
        for at in of_one
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def called(model: nn.Module, batch: Any) -> object:
    """Return model(batch), with a tuple's or a mapping's elements as arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _nystrom(Y: Tensor, omega: Tensor, total: float) -> Inputs:
    """The leading eigenvectors of C (n, n) from Ω·C (k, n) and Ω (k, n).

    C ≈ (ΩC)ᵀ·(ΩCΩᵀ)⁺·(ΩC), as in Tropp et al., https://arxiv.org/abs/1706.05736.
    """
    core = Y @ omega.mT
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values > 1e-12 * values[-1].clamp(min=1e-300)
    root = (vectors * torch.where(kept, values, 1.0).rsqrt() * kept).mT @ Y
    _, S, V = torch.linalg.svd(root, full_matrices=False)
    return Inputs(V, S.square(), total)
