"""Recipe: what every training rule is: an attachment to the steps of an optimiser, and a state to resume from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.errors import LostAdapterError, OptionError, UnsupportedLayerError
from peftkit.kernels.sharding import sharded
from peftkit.wrapping.installed import installed_parts
from peftkit.wrapping.pipeline import as_module


@dataclass(frozen=True, eq=False)
class Attachment:
    """A rule at an optimiser, until `remove`."""

    undo: tuple[Callable[[], None], ...]

    def remove(self) -> None:
        """End the rule: the optimiser's next step is its own."""
        for each in self.undo:
            each()


class Recipe(ABC):
    """A rule of training that acts around the steps of any torch optimiser.

    It sees gradients after they were accumulated, unscaled (`GradScaler` does so before its step; fused optimisers do
    so in theirs, behind the rule) and clipped, also those that a closure computes in the step. Steps that a
    `GradScaler` leaves out are no steps of the rule. Several rules at one optimiser act in the order in which they were
    attached.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        OptionError: no adapter is of a kind that the rule is for.
        UnknownAdapterError: there is no adapter of that name, or none at all.
    """

    #: what the adapters must have, for the message
    wanted: ClassVar[str]
    #: whether it is for adapters inside others too, as for that inside dora
    inside: ClassVar[bool] = True
    #: whether it reads more of a parameter than one process holds of a divided one
    needs_whole: ClassVar[bool] = True

    def __init__(self, model: nn.Module, *, name: str | None = None) -> None:
        found = installed_parts(as_module(model), name)
        found = (part for part in found if type(self).inside or part.adapter is part.at.adapter)
        #: place -> the adapter there that the rule is for
        self.parts = {part.place: part for part in found if self.takes(part.adapter)}
        if not self.parts:
            raise OptionError(
                f"{type(self).__name__}: no adapter of the model has {self.wanted}: wrap with such a kind"
            )
        self._optimizer: Optimizer | None = None

    @abstractmethod
    def takes(self, adapter: Adapter) -> bool:
        """Return whether the rule is for an adapter."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Do what the rule does when gradients are whole and the parameters are still those they were taken at."""
        del optimizer

    def after_step(self, optimizer: Optimizer) -> None:
        """Do what the rule does when an optimiser has moved the parameters."""
        del optimizer

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Act at every step of an optimiser.

        Args:
            optimizer: any of torch's, or one with its step hooks. Where several share the parameters of the adapters,
                the first that steps.

        Returns:
            A handle, whose remove() ends that.

        Raises:
            LostAdapterError: at a step: an adapter is not on the model any more.
            OptionError: the rule is attached already; or, at a step: the optimiser calls its closure several times, as
                LBFGS does.
            UnsupportedLayerError: at a step: adapters are divided among processes.
        """
        if self._optimizer is not None:
            raise OptionError(
                f"{type(self).__name__} is attached to an optimiser already, and would act twice: call remove() of "
                "that attachment first"
            )
        self._optimizer = optimizer
        before = optimizer.register_step_pre_hook(self._before)
        after = optimizer.register_step_post_hook(self._after)
        return Attachment((before.remove, after.remove, self.release_))

    def release_(self) -> None:
        """Do what follows when the rule is removed from its optimiser."""
        self._optimizer = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on bit for bit, beside model and optimiser: nothing, for most rules."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of another run.

        Args:
            state: of a rule of the same class on adapters at the same places.

        Raises:
            OptionError: it is of another rule, or of other adapters.
        """
        expected, given = sorted(self.state_dict()), sorted(state)
        if expected != given:
            raise OptionError(
                f"{type(self).__name__}: a state of {given} was given, {expected} was expected: load the rule's own"
            )
        self.resume_(state)

    def resume_(self, state: Mapping[str, Any]) -> None:
        """Take over a state with the entries of `state_dict`."""
        del state

    def evaluated(self, closure: Callable[[], Any], optimizer: Optimizer) -> Any:
        """Call the closure that a step was given, and do what comes before a step once it has made gradients."""
        loss = closure()
        with torch.no_grad():
            self.before_step(optimizer)
        return loss

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._require_present()
        if _is_left_out(optimizer):
            return None
        own, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            with torch.no_grad():
                self.before_step(optimizer)
            return None
        evaluate = _Once(self, closure, optimizer)
        return ((own, evaluate, *rest[1:]), kwargs) if rest else (args, kwargs | {"closure": evaluate})

    def _require_present(self) -> None:
        """Raise where an adapter is gone, or divided among processes."""
        gone = next((place for place, part in self.parts.items() if not part.at.is_installed), None)
        if gone is not None:
            raise LostAdapterError(
                f"{type(self).__name__}: the adapter {gone} is not there any more, by unwrap or another in its place: "
                "remove() the rule, and make it again of the model as it is"
            )
        every = (p for part in self.parts.values() for p in part.adapter.parameters())
        if type(self).needs_whole and any(map(sharded, every)):
            raise UnsupportedLayerError(
                f"{type(self).__name__}: the adapters are divided among processes, and the rule needs them whole: "
                "call fully_shard before wrap, which keeps adapters whole on every process"
            )

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if not _is_left_out(optimizer):
            with torch.no_grad():
                self.after_step(optimizer)


class _Once:
    """A closure with the rule behind it, for optimisers that call it once a step."""

    def __init__(self, rule: Recipe, closure: Callable[[], Any], optimizer: Optimizer) -> None:
        self.rule, self.closure, self.optimizer, self.called = rule, closure, optimizer, False

    def __call__(self) -> Any:
        if self.called:
            raise OptionError(
                f"{type(self.rule).__name__}: {type(self.optimizer).__name__} calls its closure several times a step, "
                "and a rule acts once: use an optimiser that computes gradients once a step"
            )
        self.called = True
        return self.rule.evaluated(self.closure, self.optimizer)


def _is_left_out(optimizer: Optimizer) -> bool:
    """Whether a fused optimiser, which unscales gradients by itself, will find that they are not finite."""
    found = vars(optimizer).get("found_inf")
    return found is not None and bool(found)
