"""LoRA-Pro, the full form: Adam's moments of the weight's gradient, and its step along the tangent space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from peftkit.adapters.pair import Pair
from peftkit.errors import OptionError, require_number, require_option
from peftkit.training.recipes.lora_pro import best_gradients
from peftkit.training.recipes.pairs import Factors, PairRecipe, wide
from peftkit.training.recipes.recipe import Attachment


@dataclass
class _Moments:
    """Adam's moments of one weight's gradient, (m, n) each."""

    steps: int
    first: Tensor
    second: Tensor


_KEYS = ("first", "second")


class LoRAProFull(PairRecipe):
    r"""LoRA-Pro, the full form: the factors take the step that is nearest to Adam's on the whole weight.

    Adam's moments are kept of G' = s·(B·g_A + g_B·A), the projection of the weight's gradient that `LoRAPro` makes.
    Adam's direction N = m̂/(√v̂ + ε) of them is projected on the tangent space again, and the gradients become those that
    move the weight along that projection (https://arxiv.org/abs/2407.18242, algorithm 1).

    What comes out is normalised already, and the paper's step subtracts it: attach the rule to SGD without momentum,
    whose `lr` is then that of Adam, and whose `weight_decay` is AdamW's, since SGD adds it behind the rule. Parameters
    that are no factors, as the magnitudes of dora, take a plain SGD step: give them an optimiser of their own.

    Memory: 2·m·n numbers a weight, in fp32 or the wider dtype of the factors, as for Adam on the whole weight: what
    LoRA saves of the optimiser's state is given up.

    Args:
        model: a wrapped model.
        betas: β₁ and β₂ of the moments.
        eps: ε.
        name: of one adapter; by default all.

    Raises:
        OptionError: a β is not in [0, 1), ε is below 0, or no adapter has two factors that train.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=1e-3, weight_decay=0.01)
        >>> handle = pk.training.LoRAProFull(model).attach(optimizer)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        name: str | None = None,
    ) -> None:
        require_option(
            len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers from 0, below 1"
        )
        require_number("eps", eps)
        super().__init__(model, name=name)
        self.betas, self.eps = betas, eps
        self._moments: dict[str, _Moments] = {}

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Act at every step of SGD without momentum; see `Recipe.attach`.

        Raises:
            OptionError: the optimiser is another one, which would normalise the step again.
        """
        if not isinstance(optimizer, SGD) or any(group["momentum"] for group in optimizer.param_groups):
            what = "SGD with momentum" if isinstance(optimizer, SGD) else type(optimizer).__name__
            raise OptionError(
                f"LoRAProFull makes Adam's step itself, and {what} would normalise or average it again: attach it to "
                "torch.optim.SGD without momentum, or LoRAPro to this optimiser"
            )
        return super().attach(optimizer)

    def before_step(self, optimizer: Optimizer) -> None:
        if vars(optimizer).get("grad_scale") is not None:
            raise OptionError(
                "LoRAProFull: a fused SGD unscales gradients in its step, and the rule needs them before: call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        super().before_step(optimizer)

    def gradients(self, place: str, own: Factors, gB: Tensor, gA: Tensor) -> tuple[Tensor, Tensor]:
        best_b, best_a = best_gradients(own, gB, gA)
        # what is of the weight's size is made in the dtype of the moments
        kind = torch.promote_types(self._pair(place).up.dtype, torch.float32)
        B, A = own.B.to(kind), own.A.to(kind)
        N = self._direction(place, own.scale * (B @ best_a.to(kind) + best_b.to(kind) @ A))
        return best_gradients(own, (own.scale * N @ A.mT).to(wide(N)), (own.scale * B.mT @ N).to(wide(N)))

    def state_dict(self) -> dict[str, Any]:
        return {"moments": {place: dict(vars(own)) for place, own in self._moments.items()}}

    def resume_(self, state: Mapping[str, Any]) -> None:
        pairs = {place: self._pair(place) for place in self.parts}
        shapes = {place: (pair.up.shape[0], pair.down.shape[1]) for place, pair in pairs.items()}
        for place, own in state["moments"].items():
            if shapes.get(place) != own["first"].shape:
                raise OptionError(
                    f"LoRAProFull: the state has moments {tuple(own['first'].shape)} of {place}, and the rule is for "
                    f"{', '.join(f'{known} {shape}' for known, shape in shapes.items())}: wrap the model as it was"
                )
        self._moments = {
            place: _Moments(own["steps"], *(own[key].to(pairs[place].up.device, copy=True) for key in _KEYS))
            for place, own in state["moments"].items()
        }

    def _pair(self, place: str) -> Pair:
        pair = self.parts[place].adapter.pair()
        assert pair is not None
        return pair

    def _direction(self, place: str, G: Tensor) -> Tensor:
        """Adam's direction (m, n) after one more gradient."""
        if place not in self._moments:
            self._moments[place] = _Moments(0, torch.zeros_like(G), torch.zeros_like(G))
        own, (beta1, beta2) = self._moments[place], self.betas
        own.steps += 1
        own.first.lerp_(G, 1 - beta1)
        own.second.mul_(beta2).addcmul_(G, G, value=1 - beta2)
        root = (own.second / (1 - beta2**own.steps)).sqrt_().add_(self.eps)
        return (own.first / (1 - beta1**own.steps)).div_(root)
