"""The monitor inside other people's loops: transformers' Trainer, Lightning, accelerate."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import peftkit as pk
from peftkit.monitor import EarlyStopping, read_run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they warn of while they are imported is not ours
    import lightning.pytorch as pl
    import transformers

    from peftkit.monitor import lightning as for_lightning
    from peftkit.monitor import trainer as for_trainer

# Lightning's own use of a name that torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*LeafSpec.*:DeprecationWarning")


class Pairs(Dataset[dict[str, Tensor]]):
    """Noise to be learned by heart."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = (torch.randn(24, 8, generator=generator) for _ in range(2))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        pk.wrap(self.body, "lora", rank=2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def trainer(folder: Path, callback: for_trainer.CSCallback, steps: int, **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy=options.pop("save_strategy", "no"),
        **options,
    )
    return transformers.Trainer(
        model=Regression(), args=arguments, train_dataset=Pairs(), eval_dataset=Pairs(), callbacks=[callback]
    )


def test_trainer_stops_and_goes_back(tmp_path: Path) -> None:
    log = tmp_path / "run.jsonl"
    callback = for_trainer.CSCallback(restore=True, stop=True, interval=1, window=3, log=log)
    own = trainer(tmp_path, callback, 200, eval_strategy="steps", eval_steps=5)
    own.train()
    stopper = callback.stopper
    assert stopper is not None
    advice = stopper.advice
    assert own.state.global_step == advice.detected < 200
    assert stopper.monitor.steps == own.state.global_step, "accumulated batches are not steps"
    kept = {s.step: s.read() for s in stopper.backups}[advice.snapshot]
    assert all(torch.equal(p, kept[n]) for n, p in own.model.named_parameters() if p.requires_grad)
    noted = [row.step for row in read_run(log).rows if "eval_loss" in row.noted]
    assert noted == list(range(5, own.state.global_step + 1, 5))


def test_trainer_resumes(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool) -> EarlyStopping:
        callback = for_trainer.CSCallback(interval=1, window=3)
        own = trainer(folder, callback, steps, save_strategy="steps", save_steps=10, lr_scheduler_type="constant")
        own.train(resume_from_checkpoint=resume)
        assert callback.stopper is not None
        return callback.stopper

    whole = run(tmp_path / "whole", 40, False)
    run(tmp_path / "parts", 20, False)
    parts = run(tmp_path / "parts", 40, True)
    assert [row.step for row in parts.rows] == list(range(1, 41))
    assert [row.cs for row in parts.rows] == pytest.approx([row.cs for row in whole.rows], rel=1e-5)
    assert parts.advice.step == whole.advice.step


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Regression()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(*batch)["loss"]

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", self.net(*batch)["loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(pk.adapter_parameters(self), lr=1e-2)


def fit(folder: Path, callback: for_lightning.CSCallback, epochs: int, resume: Path | None = None) -> pl.Trainer:
    pairs = Pairs()
    data = DataLoader(TensorDataset(pairs.x, pairs.y), batch_size=4)
    own = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    own.fit(Module(), data, data, ckpt_path=None if resume is None else str(resume), weights_only=True)
    return own


def test_lightning_stops_goes_back_and_resumes(tmp_path: Path) -> None:
    callback = for_lightning.CSCallback(restore=True, stop=True, interval=1, window=3)
    own = fit(tmp_path, callback, 100)
    stopper = callback.stopper
    assert stopper is not None
    advice = stopper.advice
    assert own.global_step == stopper.monitor.steps == advice.detected < 300
    kept = {s.step: s.read() for s in stopper.backups}[advice.snapshot]
    trained = {n: p for n, p in own.lightning_module.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, kept[n]) for n, p in trained.items())
    assert any("loss" in row.noted for row in stopper.rows)

    first = fit(tmp_path, for_lightning.CSCallback(interval=1, window=3), 4)
    first.save_checkpoint(tmp_path / "four.ckpt")
    second = for_lightning.CSCallback(interval=1, window=3)
    fit(tmp_path, second, 9, tmp_path / "four.ckpt")
    assert second.stopper is not None
    assert [row.step for row in second.stopper.rows if row.cs is not None] == list(range(1, 28))


def test_accelerate_accumulates() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    net, pairs = Regression(), Pairs()
    optimizer = torch.optim.AdamW(pk.adapter_parameters(net), lr=1e-2)
    model, optimizer, data = accelerator.prepare(
        net, optimizer, DataLoader(TensorDataset(pairs.x, pairs.y), batch_size=2)
    )
    stopper = EarlyStopping(net, optimizer=optimizer, interval=1, window=2)
    for _ in range(3):
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(x, y)["loss"])
                optimizer.step()
                optimizer.zero_grad()
    assert stopper.monitor.steps == 3 * 12 // 3
    assert [row.step for row in stopper.rows] == list(range(1, 13))
