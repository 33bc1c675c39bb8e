"""EarlyStopping as a callback of Lightning."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from peftkit.monitor.early_stopping import EarlyStopping
from peftkit.monitor.logs import RESERVED
from peftkit.wrapping.installed import installed_adapters, names_of


class CSCallback(pl.Callback):
    """Watches a run of Lightning's Trainer with EarlyStopping.

    The EarlyStopping is made with the module when training starts, and is then `stopper`. It counts the steps of the
    optimiser that holds the adapters. Validation metrics are noted beside the measurements. Checkpoints of the trainer
    hold the monitor too.

    Args:
        restore: Go back to the turning point, if there is one, when training ends.
        **options: As EarlyStopping takes them.

    Attributes:
        stopper: The EarlyStopping, None before training.

    Example:
        >>> callback = CSCallback(stop=True, window=5, restore=True)
        >>> trainer = pl.Trainer(callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, *, restore: bool = False, **options: Any) -> None:
        self.restore, self.options = restore, options
        self.stopper: EarlyStopping | None = None
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        installed = installed_adapters(pl_module, names_of(pl_module))
        own = {id(p) for where in installed for p in where.adapter.parameters()}
        holding = [o for o in trainer.optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]
        self.stopper = EarlyStopping(pl_module, optimizer=(holding or trainer.optimizers)[0], **self.options)
        state, self._state = self._state, None  # of the checkpoint of this run, not of one before it
        if state is not None:
            self.stopper.load_state_dict(state)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.stopper is not None and self.stopper.should_stop:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stopper is not None and not trainer.sanity_checking:
            metrics = {f"{name}_" if name in RESERVED else name: v for name, v in trainer.callback_metrics.items()}
            self.stopper.note(**{name: float(value) for name, value in metrics.items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stopper is None:
            return
        self.stopper.detach()
        if self.restore:
            self.stopper.restore()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.stopper is None else self.stopper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None
