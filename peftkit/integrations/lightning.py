"""Lightning checkpoints that hold the adapters and what else is trained, and not the base."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.hooks import RemovableHandle

from peftkit.integrations.state import fingerprints, may_lack_base, require_fingerprints, trained_state
from peftkit.wrapping.installed import names_of

#: the entry of a checkpoint that tells its base from others
_BASE = "peftkit_base"


class AdapterCheckpoints(pl.Callback):
    """Makes a Trainer's checkpoints hold what is trained of a wrapped module, and not its base.

    A checkpoint's state_dict has the adapters, the other parameters that require gradients, and the buffers, under
    their usual names; optimisers, schedulers, loops and callbacks are Lightning's own. `fit`, `validate`, `test` and
    `predict` with `ckpt_path` read it onto the wrapped module, strictly: of all keys only the base's may be missing,
    and a full checkpoint loads as before. ModelCheckpoint with save_weights_only=True asks no callback, and writes the
    base; so do strategies that shard the module, FSDP and DeepSpeed.

    Raises:
        UnknownAdapterError: the module is not wrapped when the Trainer sets it up.
        WrongBaseError: a checkpoint was trained on another base.

    Example:
        >>> trainer = pl.Trainer(callbacks=[AdapterCheckpoints()])  # doctest: +SKIP
        >>> trainer.fit(module, data, ckpt_path="last.ckpt")  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        names_of(pl_module)
        self._release()
        self._handle = may_lack_base(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["state_dict"] = trained_state(pl_module, checkpoint["state_dict"])
        checkpoint[_BASE] = fingerprints(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        noted = {name: entries.numpy() for name, entries in checkpoint.get(_BASE, {}).items()}
        require_fingerprints(pl_module, "the checkpoint", noted)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        """Let the module require the base of a state dict again."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
