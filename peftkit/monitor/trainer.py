"""EarlyStopping as a callback of transformers' Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftkit.monitor.early_stopping import EarlyStopping

_LOG = logging.getLogger(__name__)

#: beside Trainer's own files in a checkpoint
_STATE = "cs_monitor.pt"


class CSCallback(TrainerCallback):
    """Watches a run of transformers' Trainer with EarlyStopping.

    The EarlyStopping is made with the trainer's model when training begins, and is then `stopper`. The evaluation loss
    is noted beside the measurements. Checkpoints of the trainer hold the monitor too, and resuming goes on from there.

    Args:
        restore: Go back to the turning point, if there is one, when training ends.
        **options: As EarlyStopping takes them.

    Attributes:
        stopper: The EarlyStopping, None before training.

    Example:
        >>> callback = CSCallback(stop=True, window=5, restore=True)
        >>> trainer = Trainer(model, arguments, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, *, restore: bool = False, **options: Any) -> None:
        self.restore, self.options = restore, options
        self.stopper: EarlyStopping | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self.stopper = EarlyStopping(given["model"], optimizer=given["optimizer"], **self.options)
        if state.global_step == 0:
            return
        elsewhere = getattr(args, "resume_from_checkpoint", None)
        folders = [_checkpoint(args, state), *([Path(elsewhere)] if isinstance(elsewhere, str) else [])]
        saved = next((folder / _STATE for folder in folders if (folder / _STATE).is_file()), None)
        if saved is not None:
            self.stopper.load_state_dict(torch.load(saved, weights_only=True))
        else:
            _LOG.warning("no %s beside the checkpoint: the monitor starts over at step %d", _STATE, state.global_step)
            self.stopper.monitor.steps = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.stopper is not None and self.stopper.should_stop:
            control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        loss = given.get("metrics", {}).get("eval_loss")
        if self.stopper is not None and loss is not None:
            self.stopper.note(eval_loss=loss)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        folder = _checkpoint(args, state)
        if self.stopper is not None and folder.is_dir():
            torch.save(self.stopper.state_dict(), folder / _STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.stopper is None:
            return
        self.stopper.detach()
        if self.restore:
            self.stopper.restore()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
