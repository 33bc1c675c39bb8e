"""Training rules: what happens to the gradients of two factors before a step, or to gates after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftkit.adapters.base import Adapter
from peftkit.errors import OptionError, require_number, require_option
from peftkit.wrapping.installed import installed_parts


class Recipe(ABC):
    """A rule of training that acts around the steps of any torch optimiser.

    It sees gradients after they were accumulated, unscaled (`GradScaler` does so in its step) and clipped. It keeps no
    state: a run goes on as it was.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        OptionError: no adapter is of a kind that the rule is for.
    """

    #: what the adapters must have, for the message
    wanted: ClassVar[str] = "two factors that train, as lora has"
    #: whether it acts after a step, and not before it
    after: ClassVar[bool] = False

    def __init__(self, model: nn.Module, *, name: str | None = None) -> None:
        self.adapters = [part for part in installed_parts(model, name) if self.takes(part)]
        if not self.adapters:
            raise OptionError(
                f"{type(self).__name__}: no adapter of the model has {self.wanted}: wrap with such a kind"
            )

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Act at every step of an optimiser. Returns the hook's handle, whose remove() ends that."""

        def act(*_: object) -> None:
            self.act()

        return optimizer.register_step_post_hook(act) if self.after else optimizer.register_step_pre_hook(act)

    @torch.no_grad()
    def act(self) -> None:
        """Do once, now, what is done at every step."""
        for adapter in self.adapters:
            self.adjust_(adapter)

    @abstractmethod
    def takes(self, adapter: Adapter) -> bool:
        """Return whether the rule is for an adapter."""

    @abstractmethod
    def adjust_(self, adapter: Adapter) -> None:
        """Change the gradients, or the parameters, of one adapter."""


class _OfPairs(Recipe):
    """A rule for the gradients of two factors."""

    def takes(self, adapter: Adapter) -> bool:
        return adapter.pair() is not None

    def adjust_(self, adapter: Adapter) -> None:
        pair = adapter.pair()
        if pair is None or pair.up.grad is None or pair.down.grad is None:
            return
        wide = torch.float32 if pair.up.device.type == "mps" else torch.float64
        B, A = pair.factors()
        found = self.gradients(B.to(wide), A.to(wide), pair.up.grad.to(wide), pair.down.grad.to(wide), pair.scale)
        for parameter, gradient in zip((pair.up, pair.down), found, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)

    @abstractmethod
    def gradients(self, B: Tensor, A: Tensor, gB: Tensor, gA: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return what B (m, r) and A (r, n) have as gradients in place of gB and gA."""


class LoRAPro(_OfPairs):
    r"""LoRA-Pro, the efficient form: the step of both factors together is the best one for the whole weight.

    The gradients become those that minimise ‖s·(B·g_A + g_B·A) − G‖, of all pairs that do the nearest to the factors'
    own, where G is the gradient of the weight and s = γ: s·(B·g_A + g_B·A) is the projection of G on the tangent space.
    G itself is not needed (https://arxiv.org/abs/2407.18242, theorem 2.1).

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        OptionError: no adapter has two factors that train.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        >>> handle = pk.training.LoRAPro(model).attach(optimizer)
    """

    def gradients(self, B: Tensor, A: Tensor, gB: Tensor, gA: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        p, P = torch.linalg.eigh(B.mT @ B)
        q, Q = torch.linalg.eigh(A @ A.mT)
        inverse_b, inverse_a = _inverse(p, P), _inverse(q, Q)
        best_a = inverse_b @ gA / scale**2
        best_b = (gB - B @ (inverse_b @ (B.mT @ gB))) @ inverse_a / scale**2
        if not bool((p > _least(p)).any()):  # B is 0, at the start: nothing of A moves ΔW
            return best_b, gA
        # BᵀB·X + X·AAᵀ = −best_a·Aᵀ, solved where both Gram matrices are diagonal
        sums = p[:, None] + q
        right = P.mT @ (-best_a @ A.mT) @ Q
        X = P @ torch.where(sums > _least(sums), right / sums, 0.0) @ Q.mT
        return best_b - B @ X, best_a + X @ A


class Riemannian(_OfPairs):
    """Riemannian preconditioning: each factor's gradient over the Gram matrix of the other one.

    g_A becomes (BᵀB + δI)⁻¹·g_A, and g_B becomes g_B·(AAᵀ + δI)⁻¹: the learning rate that suits does not depend on the
    sizes of the factors (https://arxiv.org/abs/2402.02347).

    Args:
        model: a wrapped model.
        delta: δ, 0.01 by default.
        name: of one adapter; by default all.

    Raises:
        OptionError: δ is not above 0, or no adapter has two factors that train.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
        >>> handle = pk.training.Riemannian(model).attach(optimizer)
    """

    def __init__(self, model: nn.Module, *, delta: float = 0.01, name: str | None = None) -> None:
        require_number("delta", delta)
        require_option(delta > 0, "delta", delta, "a number above 0")
        super().__init__(model, name=name)
        self.delta = delta

    def gradients(self, B: Tensor, A: Tensor, gB: Tensor, gA: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        del scale
        one = self.delta * torch.eye(len(A), dtype=A.dtype, device=A.device)
        return torch.linalg.solve(A @ A.mT + one, gB.mT).mT, torch.linalg.solve(B.mT @ B + one, gA)


class SoftThreshold(Recipe):
    """SoRA's threshold: after each step, gates move towards 0 by ξ, and stay there once they reach it.

    g becomes sign(g)·max(|g| − ξ, 0), the proximal step of an L1 penalty; a gate of 0 takes its rank out of ΔW. The
    released code zeroes up to 2ξ (https://arxiv.org/abs/2311.11696).

    Args:
        model: a wrapped model.
        xi: ξ.
        name: of one adapter; by default all.

    Raises:
        OptionError: ξ is not above 0, or no adapter has gates of its ranks.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "svdlora", rank=4, init="sora")
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        >>> handle = pk.training.SoftThreshold(model, 1e-3).attach(optimizer)
    """

    wanted: ClassVar[str] = "gates of its ranks, as svdlora has"
    after: ClassVar[bool] = True

    def __init__(self, model: nn.Module, xi: float, *, name: str | None = None) -> None:
        require_number("xi", xi)
        require_option(xi > 0, "xi", xi, "a number above 0")
        super().__init__(model, name=name)
        self.xi = xi

    def takes(self, adapter: Adapter) -> bool:
        return type(adapter).gates is not None

    def adjust_(self, adapter: Adapter) -> None:
        gates = type(adapter).gates
        assert gates is not None
        gate = adapter.get_parameter(gates)
        gate.copy_(torch.nn.functional.softshrink(gate, self.xi))


def _least(eigenvalues: Tensor) -> Tensor:
    """What an eigenvalue must be above for its direction to count."""
    return 1e-12 * eigenvalues.abs().max()


def _inverse(eigenvalues: Tensor, vectors: Tensor) -> Tensor:
    """The pseudo-inverse of a Gram matrix."""
    kept = eigenvalues > _least(eigenvalues)
    return (vectors * torch.where(kept, 1 / torch.where(kept, eigenvalues, 1.0), 0.0)) @ vectors.mT
