"""ALLoRA: rows of B that are still small take larger steps."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.errors import require_number
from peftkit.training.recipes.recipe import Recipe


class ALLoRA(Recipe):
    r"""ALLoRA: the step of each row of B is scaled by 1/√(‖B_i‖ + 1/η²), so that small rows move faster.

    The factor is η where a row is 0, as all are at the start, and falls as the row grows. It scales the step that the
    optimiser makes, weight decay with it, and not the gradient, which Adam would normalise again. The method has no
    dropout and no γ: wrap without the one, and with α = r.

    Experimental: a reading of the abstract of https://arxiv.org/abs/2410.09692, which says that steps are "inversely
    proportional to the parameters' ℓ2 norm"; the square root and η are as others describe the paper.

    Args:
        model: a wrapped model.
        eta: η.
        name: of one adapter; by default all.

    Raises:
        OptionError: η is not above 0, or no adapter has two factors.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-4)
        >>> handle = pk.training.ALLoRA(model, eta=4).attach(optimizer)
    """

    wanted: ClassVar[str] = "two factors, as lora has"

    def __init__(self, model: nn.Module, eta: float, *, name: str | None = None) -> None:
        require_number("eta", eta, positive=True)
        super().__init__(model, name=name)
        self.eta = eta
        #: `up` and B, as they were before the step
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def takes(self, adapter: Adapter) -> bool:
        return adapter.pair() is not None

    def before_step(self, optimizer: Optimizer) -> None:
        del optimizer
        for place, part in self.parts.items():
            pair = part.adapter.pair()
            if pair is not None and pair.up.grad is not None:
                self._held[place] = pair.up.detach().clone(), pair.factors()[0]

    def after_step(self, optimizer: Optimizer) -> None:
        del optimizer
        for place, (up, B) in self._held.items():
            pair = self.parts[place].adapter.pair()
            assert pair is not None
            factor = (B.norm(dim=1, keepdim=True) + self.eta**-2).rsqrt()
            pair.up.copy_(up + factor * (pair.up - up))
        self._held.clear()
