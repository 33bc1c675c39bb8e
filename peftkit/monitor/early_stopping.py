"""Early stopping without validation data: keep what a run may have to go back to, and say where that is."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit._version import __version__
from peftkit.errors import MergeStateError, MismatchError, OptionError, require_integer
from peftkit.kernels.sharding import local
from peftkit.monitor.advice import Advice, Criterion
from peftkit.monitor.cs import CSMonitor
from peftkit.monitor.fluctuation import MODES, SecondValley
from peftkit.monitor.logs import RESERVED, Log, Row, log_to
from peftkit.monitor.random_walk import chance
from peftkit.monitor.record import Record
from peftkit.monitor.snapshot import Snapshot, snapshot_folder
from peftkit.wrapping.installed import adapted_modules


class EarlyStopping:
    """Watches a run, keeps snapshots of its trained parameters, and goes back to the turning point on request.

    Snapshots are copies of every parameter that requires a gradient, taken every ⌈window/2⌉ measurements; at most eight
    are kept. The optimiser's own state is not among them. Source: Algorithm 1 of the CS-Fluctuation paper; see
    SecondValley for the rule and what is known of it.

    Args:
        model: A model with adapters.
        optimizer: Counts its own steps. Without an optimizer, call `step` after each of its steps.
        name: The adapter to watch, None for all of them together.
        interval: How many optimiser steps lie between two measurements.
        window: How many measurements make a window, 5 by default, as the authors take it.
        steps_per_epoch: Makes one epoch of so many optimiser steps the window, in place of `window`.
        criterion: "robust", "paper" or "authors" (see SecondValley), or a Criterion.
        stop: Whether `should_stop` may turn true; without it there is only advice.
        also: Modules trained beside the model, whose trained parameters are kept too.
        folder: Where to keep snapshots as files, None to keep them in memory.
        log: A path ending in .jsonl or .csv, a TensorBoard SummaryWriter, a function of a Row, or several of these.
        gradients: As in CSMonitor.
        spectra: As in CSMonitor.
        weighed: As in CSMonitor.

    Attributes:
        rows: Every Row so far, without the records.

    Raises:
        OptionError: An argument is of the wrong type or out of range, or two of them contradict each other.
        UnknownAdapterError: The model has no adapter, or none of this name.
        FileError: The folder cannot be made.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        >>> report = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-2)
        >>> stopper = pk.monitor.EarlyStopping(model, optimizer=optimizer, interval=2, window=4, stop=True)
        >>> x, y = torch.randn(12, 8), torch.randn(12, 8)
        >>> for _ in range(30):
        ...     (model(x) - y).square().mean().backward()
        ...     optimizer.step()
        ...     if stopper.should_stop:
        ...         break
        >>> went_back_to = stopper.restore()  # None where there is no turning point
        >>> print(stopper.advice)
        no turning point yet: ... windows; go on, or keep the last weights
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        name: str | None = None,
        interval: int = 20,
        window: int | None = None,
        steps_per_epoch: int | None = None,
        criterion: str | Criterion = "robust",
        stop: bool = False,
        also: nn.Module | Iterable[nn.Module] = (),
        folder: str | Path | None = None,
        log: Log | Iterable[Log] = (),
        gradients: bool = False,
        spectra: int = 0,
        weighed: bool = False,
    ) -> None:
        asked: dict[str, Any] = {"gradients": gradients, "spectra": spectra, "weighed": weighed}
        self.monitor = CSMonitor(model, name=name, interval=interval, **asked)
        if isinstance(criterion, SecondValley) and window is None and steps_per_epoch is None:
            window = criterion.fluctuation.window
        self.window = _window(window, steps_per_epoch, interval)
        self.criterion = SecondValley(self.window, mode=criterion) if isinstance(criterion, str) else criterion
        if not callable(getattr(self.criterion, "see", None)) or isinstance(self.criterion, type):
            raise OptionError(
                f"criterion={criterion!r} was given, one of {', '.join(MODES)} or a Criterion was expected"
            )
        if isinstance(self.criterion, SecondValley) and self.criterion.fluctuation.window != self.window:
            own = self.criterion.fluctuation.window
            raise OptionError(f"windows of {self.window} and a criterion with windows of {own} were given; give one")
        self.stop, self.also = stop, (also,) if isinstance(also, nn.Module) else tuple(also)
        if odd := [module for module in self.also if not isinstance(module, nn.Module)]:
            raise OptionError(f"also={odd[0]!r} was given, modules were expected")
        self.folder = None if folder is None else snapshot_folder(folder)
        self.rows: list[Row] = []
        self.backups: list[Snapshot] = []
        self._steps: list[int] = []  # of every measurement
        self.diverged = 0  # measurements that were not finite, which nothing is made of
        self.every = -(-self.window // 2)
        self._run = secrets.token_hex(4)  # in the names of files, so that runs may share a folder
        self._logs = log_to(log)
        self.monitor.listeners.append(self._take)
        if optimizer is not None:
            self.attach(optimizer)

    @property
    def model(self) -> nn.Module:
        """The model that is watched."""
        return self.monitor.model

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the optimiser's own steps from now on; see `CSMonitor.attach`."""
        self.monitor.attach(optimizer)

    def detach(self) -> None:
        """Stop counting steps, and keep what was seen so far."""
        self.monitor.detach()

    def step(self, lr: float | None = None) -> bool:
        """Count one optimiser step, and return whether to stop; see `CSMonitor.step`.

        Args:
            lr: The learning rate to record.
        """
        self.monitor.step(lr)
        return self.should_stop

    @property
    def should_stop(self) -> bool:
        """Whether a turning point was found; always False without stop=True."""
        return self.stop and self.criterion.found is not None

    def note(self, **values: float) -> None:
        """Log and draw other numbers beside the measurements; no rule uses them.

        Args:
            **values: Numbers by name, such as validation=0.31.

        Raises:
            OptionError: A value is no number, or its name is one of the monitor's own.
        """
        if taken := sorted(values.keys() & RESERVED):
            raise OptionError(
                f"{taken[0]}={values[taken[0]]!r} was noted, a name other than the monitor's own was expected"
            )
        try:
            noted = {key: float(value) for key, value in values.items()}
        except (TypeError, ValueError) as error:
            raise OptionError(f"{values} was noted, numbers by name were expected") from error
        self._tell(Row(step=self.monitor.steps, noted=noted))

    @property
    def advice(self) -> Advice:
        """What is known so far: the turning point, the snapshot nearest to it, and how much it says."""
        found, steps = self.criterion.found, self._steps
        windows = (len(steps) if found is None else found.detected + 1) / self.window
        known = chance(self.criterion, windows) if isinstance(self.criterion, SecondValley) else None
        valleys = tuple(steps[v] for v in self.criterion.valleys)
        if found is None:
            return Advice(None, None, None, windows, known, valleys, self.diverged)
        nearest = self._nearest(found.measurement)
        kept = None if nearest is None else nearest.step
        return Advice(steps[found.measurement], kept, steps[found.detected], windows, known, valleys, self.diverged)

    # -- snapshots ------------------------------------------------------------------------------------------------

    def restore(self) -> int | None:
        """Put the parameters back, in place, as they were at the turning point.

        Returns:
            The optimiser steps before the snapshot. Without a turning point, None, and nothing is changed.

        Raises:
            MergeStateError: Adapters are merged into the model.
            MismatchError: The model has other parameters than the snapshot; nothing was put back.
            FileError: The file of the snapshot is gone or damaged.
        """
        if any(host.adapter_state.merged is not None for host in adapted_modules(self.model).values()):
            raise MergeStateError("adapters are merged into the model: call peftkit.restore(model) before going back")
        found = self.criterion.found
        snapshot = None if found is None else self._nearest(found.measurement)
        if snapshot is None:
            return None
        stored, now = snapshot.read(), dict(self._parameters())
        for key, tensor in stored.items():  # all before any: nothing is half put back
            shape = tuple(local(now[key]).shape) if key in now else "not there"
            if shape != tuple(tensor.shape):
                raise MismatchError(
                    f"{key}: {tuple(tensor.shape)} in the snapshot of step {snapshot.step}, {shape} in the model; "
                    "nothing was put back"
                )
        with torch.no_grad():
            for key, tensor in stored.items():
                local(now[key]).copy_(tensor)
        return snapshot.step

    def _parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Every parameter, trained or not, under a name of its own."""
        for i, module in enumerate((self.model, *self.also)):
            for key, parameter in module.named_parameters():
                yield (key if i == 0 else f"also.{i - 1}.{key}"), parameter

    def _keep(self, measurement: int, step: int) -> None:
        """Take a snapshot if one is due, and drop every snapshot that can no longer be the turning point."""
        if measurement % self.every == 0:
            trained = ((key, p) for key, p in self._parameters() if p.requires_grad)
            tensors = {key: local(p).detach().to("cpu", copy=True).contiguous() for key, p in trained}
            self.backups.append(self._stored(measurement, step, tensors))
        pending, ahead = self.criterion.wanted
        found = self.criterion.found
        wanted = [pending] if found is None else [found.measurement]
        kept = [s for w in wanted if w is not None and (s := self._nearest(w)) is not None]
        if found is None:
            kept += [s for s in self.backups if s.measurement >= ahead - self.every / 2 and s not in kept]
        for gone in self.backups:
            if gone not in kept and gone.path is not None:
                gone.path.unlink(missing_ok=True)
        self.backups = sorted(kept, key=lambda s: s.measurement)

    def _stored(self, measurement: int, step: int, tensors: dict[str, Tensor]) -> Snapshot:
        """A snapshot in memory, or in a file of the folder."""
        snapshot = Snapshot(measurement, step, tensors)
        return snapshot if self.folder is None else snapshot.written(self.folder, self._run)

    def _nearest(self, measurement: int) -> Snapshot | None:
        return min(self.backups, key=lambda s: abs(s.measurement - measurement), default=None)

    # -- every measurement ----------------------------------------------------------------------------------------

    def _take(self, record: Record) -> None:
        if not record.finite:  # whether a run that diverged goes on is for its owner to decide
            self.diverged += 1
            self._tell(Row(record.step, lr=record.lr, noted={"diverged": 1.0}, record=record))
            return
        before, valleys = self.criterion.found, len(self.criterion.valleys)
        value = self.criterion.see(record)
        self._steps.append(record.step)
        row = Row(record.step, record.cs, record.ratio, value, record.lr, record=record)
        self._keep(len(self._steps) - 1, record.step)
        found = self.criterion.found
        if len(self.criterion.valleys) > valleys:
            row.valley = self._steps[self.criterion.valleys[-1]]
        if found is not None and before is None:
            row.turning_point = self._steps[found.measurement]
        self._tell(row)

    def _tell(self, row: Row) -> None:
        if not self.rows:
            settings = {**self._settings(), "peftkit": __version__}
            for log in self._logs:
                log(Row(step=0, settings=settings))
        self.rows.append(row.without_record())
        for log in self._logs:
            log(row)

    # -- going on after a stop --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on, snapshots too, in types that `torch.load(weights_only=True)` takes."""
        return {
            **self._settings(),
            "run": self._run,
            "monitor": self.monitor.state_dict(),
            "criterion": self.criterion.state_dict(),
            "diverged": self.diverged,
            "rows": [asdict(row) for row in self.rows],
            "snapshots": [  # whole, also those in files, which are gone when the run has gone on from here
                {"measurement": s.measurement, "step": s.step, "tensors": s.read()} for s in self.backups
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, in the middle of a window and to the bit.

        Args:
            state: Of an EarlyStopping with the same window, interval and rule.

        Raises:
            OptionError: The state is of other options, or is incomplete.
        """
        own = self._settings()
        came = {key: state.get(key) for key in own}
        if own != came:
            raise OptionError(
                f"a state of {came} was given to an EarlyStopping of {own}: make it with the same options"
            )
        missing = {"run", "monitor", "criterion", "rows", "snapshots", "diverged"} - state.keys()
        if missing:
            raise OptionError(
                f"a state without {', '.join(sorted(missing))} was given, one of state_dict() was expected"
            )
        self._run = state["run"]
        self.monitor.load_state_dict(state["monitor"])
        self.criterion.load_state_dict(state["criterion"])
        self.rows = [Row(**row) for row in state["rows"]]
        self._steps = [row.step for row in self.rows if row.cs is not None]
        self.backups = [self._stored(s["measurement"], s["step"], s["tensors"]) for s in state["snapshots"]]
        self.diverged = state["diverged"]

    def _settings(self) -> dict[str, Any]:
        """The options that a state must have been made with."""
        own = self.criterion
        rule = own.settings() if isinstance(own, SecondValley) else {"rule": type(own).__name__}
        return {"window": self.window, "interval": self.monitor.interval, **rule}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw CS, its fluctuation, valleys, the turning point and what was noted.

        Args:
            path: Where to write the picture (.png, .svg, .pdf), None to write nothing.

        Returns:
            A matplotlib Figure.

        Raises:
            OptionError: There is no measurement yet, matplotlib is not installed, or the format is unknown.
        """
        from peftkit.monitor.plot import draw

        return draw(self.rows, self.window, path=path)


def _window(window: int | None, steps_per_epoch: int | None, interval: int) -> int:
    if window is not None and steps_per_epoch is not None:
        raise OptionError(f"window={window} and steps_per_epoch={steps_per_epoch} were given; give one of them")
    if steps_per_epoch is None:
        return 5 if window is None else window
    two = f"a number of steps, two intervals of {interval} or more (measure more often),"
    require_integer("steps_per_epoch", steps_per_epoch, 2 * interval, two)
    return round(steps_per_epoch / interval)
