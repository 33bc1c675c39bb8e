"""Lightning: its checkpoints hold no base, and a resumed run is the run that was not interrupted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import peftkit as pk
from peftkit.errors import UnknownAdapterError, WrongBaseError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it warns of while it is imported is not ours
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from peftkit.integrations.lightning import AdapterCheckpoints

# Lightning's own use of a name that torch deprecates, and what it advises
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", "ignore:.*LeafSpec.*:DeprecationWarning", "ignore:.*does not have many workers"
)


class Module(pl.LightningModule):
    """A net with an adapted layer, a head that trains, and running statistics."""

    def __init__(self, kind: str = "lora", wrapped: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 8))
        if wrapped:
            pk.wrap(self.net, kind, targets=["0", "3"], **options)
            self.net[4].requires_grad_(True)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(pk.parameter_groups(self, lr=1e-2, ratio=4))
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(*(torch.randn(24, 8, generator=generator) for _ in range(2))), batch_size=4)


def trainer(folder: Path, epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks) or [AdapterCheckpoints()],
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def fitted(folder: Path, epochs: int, resume: Path | None = None, module: Module | None = None) -> Module:
    own, module = trainer(folder, epochs), Module(rank=2) if module is None else module
    own.fit(module, data(), ckpt_path=None if resume is None else str(resume), weights_only=True)
    own.save_checkpoint(folder / f"{epochs}.ckpt")
    return module


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def test_a_checkpoint_holds_no_base_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", 6)
    fitted(tmp_path, 3)
    parts = fitted(tmp_path, 6, tmp_path / "3.ckpt")
    assert states_equal(whole, parts)
    saved, full = (torch.load(f / "6.ckpt", weights_only=True) for f in (tmp_path, tmp_path / "whole"))
    kept = saved["state_dict"]
    assert {key for key in kept if ".adapters." not in key} == {
        "net.4.weight", "net.4.bias", "net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"
    }  # fmt: skip
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in kept.items())
    for own, other in zip(saved["optimizer_states"], full["optimizer_states"], strict=True):
        for key, state in own["state"].items():
            assert all(torch.equal(value, other["state"][key][name]) for name, value in state.items())


def test_testing_with_a_checkpoint_reads_it(tmp_path: Path) -> None:
    expected = trainer(tmp_path, 1).test(fitted(tmp_path, 3), data(), verbose=False)
    got = trainer(tmp_path, 1).test(Module(rank=2), data(), ckpt_path=str(tmp_path / "3.ckpt"), verbose=False)
    assert got == expected
    assert got != trainer(tmp_path, 1).test(Module(rank=2), data(), verbose=False)


def test_the_best_of_model_checkpoint_is_read(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_epochs=1)
    own, module = trainer(tmp_path, 3, AdapterCheckpoints(), saver), Module(rank=2)
    own.fit(module, data())
    files = sorted((tmp_path / "saved").iterdir())
    assert len(files) == 3
    assert not any("net.0.weight" in torch.load(path, weights_only=True)["state_dict"] for path in files)
    again = trainer(tmp_path, 1, AdapterCheckpoints(), saver)
    got = again.test(Module(rank=2), data(), ckpt_path=str(files[-1]), verbose=False)
    assert got == trainer(tmp_path, 1).test(module, data(), verbose=False)


def test_a_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path, 1)
    for other in (Module("loha", rank=2), Module(rank=2, decompose=True)):
        with pytest.raises(RuntimeError, match="Missing key"):
            fitted(tmp_path, 2, tmp_path / "1.ckpt", other)
    moved = Module(rank=2)
    with torch.no_grad():
        moved.net[0].weight.mul_(2)
    with pytest.raises(WrongBaseError, match="another base"):
        fitted(tmp_path, 2, tmp_path / "1.ckpt", moved)


def test_a_base_with_a_hole_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path, 1)
    checkpoint = torch.load(tmp_path / "1.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.0.bias"] = torch.zeros(64)
    torch.save(checkpoint, tmp_path / "hole.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.0\.weight"):
        fitted(tmp_path, 2, tmp_path / "hole.ckpt")


def test_a_full_checkpoint_resumes_too(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", 4)
    own = trainer(tmp_path, 2, pl.Callback())
    own.fit(Module(rank=2), data())
    own.save_checkpoint(tmp_path / "full.ckpt")
    assert "net.0.weight" in torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    assert states_equal(fitted(tmp_path, 4, tmp_path / "full.ckpt"), whole)


def test_after_the_run_a_module_requires_its_base_again(tmp_path: Path) -> None:
    module = fitted(tmp_path, 1)
    kept = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(kept)

    class Failing(Module):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            raise ArithmeticError

    failing = Failing(rank=2)
    with pytest.raises(ArithmeticError):
        fitted(tmp_path, 1, None, failing)
    with pytest.raises(RuntimeError, match="Missing key"):
        failing.load_state_dict(kept)


def test_a_module_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError):
        trainer(tmp_path, 1).fit(Module(wrapped=False), data())
