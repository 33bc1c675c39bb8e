"""AdaLoRA's allocation: ranks go, one after another, to the weights where they matter most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.errors import OptionError, UnknownAdapterError, require_integer, require_option
from peftkit.training.recipes.recipe import Recipe

#: what is kept of each parameter: the averages of its importance, and of how much that varies
_KEYS = ("importance", "variation")


class AdaLoRA(Recipe):
    r"""AdaLoRA's budget: gates of the ranks that matter least are set to 0, fewer and fewer stay.

    After each step s = Ī·Ū is found of every number θ, where Ī is the average over steps of |θ·∂L/∂θ| and Ū that of its
    variation; a rank's score is that of its gate plus the means of those of its column of B and its row of A. Of all
    ranks b stay, from all of them after `warmup` steps to `target` a weight `final` steps before the end,
    b = b₁ + (b₀ − b₁)·(1 − t)³, and the gates of the others are set to 0; a gate that was set to 0 may grow back until
    then. As in the released code and in PEFT, θ is read after the step and its gradient before
    (https://arxiv.org/abs/2303.10512). `ranks()` is for `pk.resize_`, when training is over.

    Args:
        model: a wrapped model.
        target: how many ranks a weight has in the mean at the end.
        total: how many steps training takes.
        warmup: steps with all ranks at first, tinit of PEFT.
        final: steps at the end in which the ranks stay, tfinal of PEFT.
        every: how many steps lie between two allocations, deltaT of PEFT.
        betas: of the averages of importance and variation.
        name: of one adapter; by default all.

    Raises:
        OptionError: a number is not possible, or no adapter has gates of its ranks.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "svdlora", rank=6)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-2)
        >>> rule = pk.training.AdaLoRA(model, target=3, total=20, warmup=2, final=5)
        >>> handle = rule.attach(optimizer)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     (model(torch.randn(4, 8)).square().mean() + 0.1 * rule.penalty()).backward()
        ...     _ = optimizer.step()
        >>> sum(rule.ranks().values())
        6
        >>> handle.remove()
        >>> changed = pk.resize_(model, rule.ranks())
    """

    wanted: ClassVar[str] = "gates of its ranks, as svdlora has"

    def __init__(
        self,
        model: nn.Module,
        target: int,
        total: int,
        *,
        warmup: int = 0,
        final: int = 0,
        every: int = 1,
        betas: tuple[float, float] = (0.85, 0.85),
        name: str | None = None,
    ) -> None:
        for option, value, least in (("target", target, 1), ("warmup", warmup, 0), ("final", final, 0)):
            require_integer(option, value, least, "an integer")
        require_integer("total", total, warmup + final + 1, "more steps than warmup and final take: an integer")
        require_integer("every", every, 1, "an integer")
        numbers = isinstance(betas, Sequence) and all(isinstance(beta, (int, float)) for beta in betas)
        between = numbers and len(betas) == 2 and all(0 < beta < 1 for beta in betas)
        require_option(between, "betas", betas, "two numbers between 0 and 1")
        super().__init__(model, name=name)
        self.target, self.total, self.warmup, self.final, self.every = target, total, warmup, final, every
        self.betas, self.steps = betas, 0
        self._averages: dict[str, dict[str, dict[str, Tensor]]] = {}

    def takes(self, adapter: Adapter) -> bool:
        return type(adapter).gates is not None

    @property
    def budget(self) -> int:
        """How many ranks the next allocation keeps, of all weights together."""
        whole = sum(len(gate) for gate in self._gates().values())
        least = min(self.target * len(self.parts), whole)
        if self.steps <= self.warmup:
            return whole
        if self.steps > self.total - self.final:
            return least
        left = 1 - (self.steps - self.warmup) / (self.total - self.final - self.warmup)
        return int((whole - least) * left**3 + least)

    def penalty(self) -> Tensor:
        """Return the mean of ‖BᵀB − 1‖ and ‖AAᵀ − 1‖ over all weights, which keeps their ranks apart, for the loss."""
        terms = []
        for part in self.parts.values():
            B, A = part.adapter.get_parameter("up"), part.adapter.get_parameter("down")
            one = torch.eye(len(A), dtype=A.dtype, device=A.device)
            terms += [torch.linalg.matrix_norm(B.mT @ B - one), torch.linalg.matrix_norm(A @ A.mT - one)]
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()

    def ranks(self, name: str | None = None) -> dict[str, int]:
        """Return weight -> how many of its gates are not 0.

        Args:
            name: of the adapter; may be left out where the rule is for one.

        Raises:
            UnknownAdapterError: the rule is for several and none is named, or for none of that name.
        """
        names = list(dict.fromkeys(part.at.name for part in self.parts.values()))
        wanted = names[0] if name is None and len(names) == 1 else name
        if wanted not in names:
            raise UnknownAdapterError(
                f"AdaLoRA: name={name!r} was given, and the rule is for {', '.join(names)}: say which by name="
            )
        gates = {self.parts[place].at: gate for place, gate in self._gates().items()}
        return {at.site: int(gate.count_nonzero()) for at, gate in gates.items() if at.name == wanted}

    def after_step(self, optimizer: Optimizer) -> None:
        del optimizer
        self.steps += 1
        last = self.total - self.final
        if self.steps < last:
            for place, part in self.parts.items():
                self._see(place, part.adapter)
        if self.steps >= last or (self.steps > self.warmup and self.steps % self.every == 0):
            self._allocate()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "averages": self._averages}

    def resume_(self, state: Mapping[str, Any]) -> None:
        named = {place: dict(part.adapter.named_parameters()) for place, part in self.parts.items()}
        averages = state["averages"].items()
        wrong = [f"{p}.{n}" for p, own in averages for n in own if not _fits(own[n], named.get(p, {}).get(n))]
        if wrong:
            raise OptionError(
                f"AdaLoRA: the state has averages of {wrong[0]}, and the rule is for no such parameter of that shape: "
                "wrap the model as it was"
            )
        self.steps = state["steps"]
        self._averages = {
            p: {n: {key: each[key].to(named[p][n].device, copy=True) for key in _KEYS} for n, each in own.items()}
            for p, own in averages
        }

    def _gates(self) -> dict[str, Tensor]:
        """The gates of each adapter."""
        found: dict[str, Tensor] = {}
        for place, part in self.parts.items():
            gates = type(part.adapter).gates
            assert gates is not None
            found[place] = part.adapter.get_parameter(gates).detach()
        return found

    def _see(self, place: str, adapter: Adapter) -> None:
        """Add the importance of one adapter's numbers to their averages."""
        own = self._averages.setdefault(place, {})
        for name, parameter in adapter.named_parameters():
            if parameter.grad is None:
                continue
            kept = own.setdefault(name, {key: torch.zeros_like(parameter) for key in _KEYS})
            importance, variation = (kept[key] for key in _KEYS)
            now = (parameter * parameter.grad).abs().nan_to_num(0.0, 0.0)  # a bad step says nothing, nor later ones
            importance.lerp_(now, 1 - self.betas[0])
            variation.lerp_((now - importance).abs(), 1 - self.betas[1])

    def _allocate(self) -> None:
        """Set the gates of all but the most important ranks to 0."""
        gates = self._gates()
        scores = torch.cat([self._score(place, gate).cpu() for place, gate in gates.items()])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[: self.budget]] = True
        for gate, mask in zip(gates.values(), kept.split([len(gate) for gate in gates.values()]), strict=True):
            gate.mul_(mask.to(gate.device))

    def _score(self, place: str, gate: Tensor) -> Tensor:
        """The score of each rank of one adapter."""
        each = {name: own[_KEYS[0]] * own[_KEYS[1]] for name, own in self._averages.get(place, {}).items()}
        gates = type(self.parts[place].adapter).gates
        of_gate = each.get(str(gates), torch.zeros_like(gate))
        of_up = each["up"].mean(0) if "up" in each else torch.zeros_like(gate)
        return of_gate + of_up + (each["down"].mean(1) if "down" in each else torch.zeros_like(gate))


def _fits(averages: Mapping[str, Tensor], parameter: Tensor | None) -> bool:
    return parameter is not None and all(averages[key].shape == parameter.shape for key in _KEYS)
