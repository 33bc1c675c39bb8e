"""How ΔW lies against W: cosine and norms of every adapted weight, without a matrix of W's size."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.delta import Delta
from peftkit.delta.base import WeightCache
from peftkit.delta.distance import product
from peftkit.errors import OptionError, UnknownAdapterError, require_integer, require_option
from peftkit.kernels.blocks import row_sqnorms
from peftkit.kernels.sharding import local, sharded, whole
from peftkit.kernels.torch_private import is_outermost_step, own_modules, set_training
from peftkit.monitor.record import Record
from peftkit.monitor.sharding import inner_and_sqnorm
from peftkit.monitor.spectrum import spectra
from peftkit.wrapping.backup import checksum
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, names_of

_LOG = logging.getLogger(__name__)


class CSMonitor:
    """Measures an adapted model after every `interval` optimiser steps, and passes each Record to its listeners.

    ΔW is measured as in evaluation, without dropout. Nothing of the size of W is built, except that a weight that does
    not lie in memory as its matrix (channels_last, transposed convolutions) is copied while it is read.

    Args:
        model: A model with adapters.
        name: The adapter to measure, None for all of them together.
        interval: How many optimiser steps lie between two measurements.
        optimizer: Counts its own steps from now on, without steps that a gradient scaler skips. Without an optimizer,
            call `step` after each of its steps.
        gradients: Record the norms of the adapters' gradients too.
        spectra: Add the effective and the stable rank of every ΔW to one in so many measurements; 0 adds none.
        weighed: Weigh the mean cosine by the sizes of the weights, so that a tiny weight whose cosine jumps counts
            little.

    Attributes:
        listeners: Functions of a Record, called with every measurement.
        steps: The optimiser steps counted so far.

    Raises:
        OptionError: An argument is of the wrong type or out of range.
        UnknownAdapterError: The model has no adapter, or none of this name.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
        >>> monitor = pk.monitor.CSMonitor(model, interval=2, optimizer=optimizer)
        >>> monitor.listeners.append(lambda record: print(record.step, sorted(record.norms)))
        >>> for _ in range(4):
        ...     model(torch.ones(3, 8)).sum().backward()
        ...     optimizer.step()
        2 ['0', '2']
        4 ['0', '2']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        interval: int = 20,
        optimizer: torch.optim.Optimizer | None = None,
        gradients: bool = False,
        spectra: int = 0,
        weighed: bool = False,
    ) -> None:
        require_integer("interval", interval, 1, "a number of optimiser steps")
        require_integer("spectra", spectra, 0, "a number of measurements")
        require_option(isinstance(model, nn.Module), "model", model, "an nn.Module that adapters are on")
        names_of(model, name)
        self.model, self.name, self.interval, self.gradients = model, name, interval, gradients
        self.spectra, self.weighed = spectra, weighed
        self.steps = self.measurements = 0
        self.listeners: list[Callable[[Record], object]] = []
        self._caches: WeakKeyDictionary[Adapter, WeightCache] = WeakKeyDictionary()
        self._optimizer: torch.optim.Optimizer | None = None
        self._hook: Any = None
        if optimizer is not None:
            self.attach(optimizer)

    # -- counting steps -----------------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an optimiser's steps, also where another object makes them (a scaler, accelerate, a trainer).

        Args:
            optimizer: A torch optimiser, or accelerate's wrapper of one.

        Raises:
            OptionError: It is no optimiser.
        """
        self.detach()
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        require_option(isinstance(optimizer, torch.optim.Optimizer), "optimizer", optimizer, "a torch.optim.Optimizer")
        own = {id(p) for where in self._placed() for p in where.adapter.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            _LOG.warning("none of the adapters' parameters is in the optimizer: are its steps the ones to count?")
        self._optimizer = optimizer
        self._hook = optimizer.register_step_post_hook(self._stepped)

    def detach(self) -> None:
        """Stop counting the optimiser's steps."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._optimizer = None

    def step(self, lr: float | None = None) -> Record | None:
        """Count one optimiser step, and return the measurement if one was due.

        Args:
            lr: The learning rate to record.

        Returns:
            The measurement; None between two of them, and while every ΔW is 0.

        Raises:
            OptionError: The monitor counts the steps of its optimizer by itself.
        """
        if self._hook is not None:
            raise OptionError("step() was called, but this monitor counts the steps of its optimizer by itself")
        return self._step(None if lr is None else float(lr))

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimiser is called, and skips by itself
        if (found_inf is not None and bool(found_inf)) or not is_outermost_step(optimizer):
            return
        try:
            self._step(None)
        except UnknownAdapterError as error:  # unwrapped: that is no reason to stop training
            _LOG.warning("the monitor stops counting: %s", error)
            self.detach()

    def _step(self, lr: float | None) -> Record | None:
        self.steps += 1
        if self.steps % self.interval:
            return None
        record = self.measure(lr)
        if record.zero:
            return None
        self.measurements += 1
        if self.spectra and self.measurements % self.spectra == 0:
            record = replace(record, spectra=spectra(self.model, self.name))
        for listener in self.listeners:
            listener(record)
        return record

    def learning_rate(self) -> float | None:
        """Return the largest rate of the optimizer's groups with adapters' parameters, None without an optimizer."""
        if self._optimizer is None:
            return None
        groups = self._optimizer.param_groups
        if len(groups) > 1:
            own = {id(p) for where in self._placed() for p in where.adapter.parameters()}
            groups = [group for group in groups if any(id(p) in own for p in group["params"])] or groups
        return max(float(group["lr"]) for group in groups)

    # -- measuring ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, lr: float | None = None) -> Record:
        """Measure the model as it is now.

        Args:
            lr: The learning rate to record, by default the optimizer's.

        Returns:
            The measurement, which goes to no listener.

        Raises:
            UnknownAdapterError: The adapter was taken off the model.

        Example:
            >>> model = nn.Sequential(nn.Linear(8, 4))
            >>> report = pk.wrap(model, "lora", rank=2)
            >>> pk.monitor.CSMonitor(model).measure().zero
            True
        """
        everything = self._placed()
        sites: dict[str, list[InstalledAdapter]] = {}
        for where in everything:
            sites.setdefault(where.site, []).append(where)
        scalars: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        crossed: dict[str, float] = {}
        device = next(everything[0].adapter.parameters()).device.type
        with torch.autocast(device, enabled=False), _evaluating(everything):
            for site, here in sites.items():
                makers: list[Callable[[], Delta]] = []
                for where in here:
                    make, *numbers = self._measured(where)
                    scalars[site, where.name] = cast(tuple[Tensor, Tensor, Tensor], tuple(numbers))
                    makers.append(make)
                if len(here) > 1:
                    crossed[site] = _crossed(here, [make() for make in makers])
        numbers = _numbers(scalars)
        lr = self.learning_rate() if lr is None else lr
        names = list(dict.fromkeys(name for _, name in scalars))
        found = {name: {s: numbers[s, n] for s, n in numbers if n == name} for name in names}
        gradients = self._gradients(sites) if self.gradients else {}
        sizes = {site: here[0].base.numel() for site, here in sites.items()} if self.weighed else {}
        if len(names) == 1:
            return self._record(found[names[0]], lr, gradients, sizes)
        total: dict[str, tuple[float, float, float]] = {}
        for site, here in sites.items():
            parts = [(where.strength, *numbers[site, where.name]) for where in here]
            square = sum(s * s * q for s, _, q, _ in parts) + crossed.get(site, 0.0)
            total[site] = sum(s * i for s, i, _, _ in parts), square, parts[0][3]
        alone = {name: self._record(values, lr, {}, sizes) for name, values in found.items()}
        return self._record(total, lr, gradients, sizes, alone)

    def _placed(self) -> list[InstalledAdapter]:
        found = list(installed_adapters(self.model, None if self.name is None else (self.name,)))
        if not found:
            names_of(self.model, self.name)  # raises, and says why
        return found

    def _record(
        self,
        numbers: Mapping[str, tuple[float, float, float]],
        lr: float | None,
        gradients: dict[str, float],
        sizes: dict[str, int],
        alone: dict[str, Record] | None = None,
    ) -> Record:
        """A record of <ΔW, W>, ‖ΔW‖² and ‖W‖² by weight."""
        cosines, norms, ratios = {}, {}, {}
        for site, (inner, square, base) in numbers.items():
            norm, size = math.sqrt(0.0 if square < 0 else square), math.sqrt(base)  # NaN stays NaN
            norms[site] = norm
            cosines[site] = 0.0 if norm * size == 0 else inner / (norm * size)
            ratios[site] = 0.0 if size == 0 else norm / size
        return Record(self.steps, cosines, norms, ratios, lr, gradients, alone or {}, sizes=sizes)

    def _measured(self, where: InstalledAdapter) -> tuple[Callable[[], Delta], Tensor, Tensor, Tensor]:
        """What makes ΔW, <ΔW, W>, ‖ΔW‖² and ‖W‖², the last three as scalars that may still be on a device."""
        W, adapter = where.base, where.adapter
        cache = self._caches.setdefault(adapter, WeightCache()).check(lambda: _fingerprint(where))
        if sharded(W):
            delta, inner, square, base = inner_and_sqnorm(adapter, W, cache)
            return lambda: delta, inner, square, base
        return lambda: adapter.delta(W).upcast(), *adapter.inner_and_sqnorm(W, cache), row_sqnorms(W).sum()

    @staticmethod
    def _gradients(sites: Mapping[str, list[InstalledAdapter]]) -> dict[str, float]:
        scalars = {}
        for site, here in sites.items():
            grads = [p.grad for where in here for p in where.adapter.parameters() if p.grad is not None]
            norms = [torch.linalg.vector_norm(grad.float()) for grad in grads]
            if norms:
                scalars[site] = torch.linalg.vector_norm(torch.stack([whole(norm) for norm in norms]))
        return {site: float(value) for site, value in scalars.items()}

    # -- going on after a stop ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of steps and measurements, for `load_state_dict`."""
        return {"steps": self.steps, "measurements": self.measurements}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from what `state_dict` returned."""
        self.steps, self.measurements = int(state["steps"]), int(state["measurements"])


def _fingerprint(where: InstalledAdapter) -> object:
    """A checksum of the weight's numbers and the adapter's constants, equal to nothing where they are on a device.

    There a checksum would have to be waited for, and takes as long as what is to be cached.
    """
    tensors = [local(tensor) for tensor in (where.base, *where.adapter.buffers())]
    return [checksum(tensor) for tensor in tensors] if all(tensor.is_cpu for tensor in tensors) else object()


@contextmanager
def _evaluating(adapters: Iterable[InstalledAdapter]) -> Iterator[None]:
    """Adapters in evaluation mode within the block, so that ΔW has no dropout."""
    held = (where.adapter for where in adapters)
    training = [module for own in held for module in (own.modules() if own_modules(own) else [own]) if module.training]
    for module in training:
        set_training(module, False)
    try:
        yield
    finally:
        for module in training:
            set_training(module, True)


def _numbers(
    scalars: Mapping[tuple[str, str], tuple[Tensor, Tensor, Tensor]],
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """The scalars in float64: one transfer from each device, however many weights there are."""
    by_device: dict[torch.device, list[tuple[str, str]]] = {}
    for key, values in scalars.items():
        by_device.setdefault(values[0].device, []).append(key)
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    for keys in by_device.values():
        flat = torch.stack([value for key in keys for value in scalars[key]]).cpu().double().tolist()
        for i, key in enumerate(keys):
            found[key] = flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]
    return {key: found[key] for key in scalars}


def _crossed(here: list[InstalledAdapter], deltas: list[Delta]) -> float:
    """Σ over pairs of 2·λᵢ·λⱼ·<ΔWᵢ, ΔWⱼ>."""
    return sum(
        2 * here[i].strength * here[j].strength * product(deltas[i], deltas[j])
        for i in range(len(here))
        for j in range(i)
    )
