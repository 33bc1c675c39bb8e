"""Two processes under DistributedDataParallel: one writes the checkpoint, without the base, and both resume from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftkit.integrations.accelerate import adapter_checkpoints
from tests.integrations import test_accelerate, test_transformers
from tests.support.processes import distributed

pytestmark = pytest.mark.processes


def launched() -> None:
    """The variables that a launcher sets, for the group that there is."""
    rank, world = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def by_trainer(folder: Path) -> dict[str, Tensor]:
    launched()
    whole = test_transformers.trainer(folder / "whole", 8, ddp_backend="gloo")
    whole.train()
    assert isinstance(whole.model_wrapped, nn.parallel.DistributedDataParallel)
    test_transformers.trainer(folder / "parts", 4, ddp_backend="gloo").train()
    parts = test_transformers.trainer(folder / "parts", 8, ddp_backend="gloo")
    parts.train(resume_from_checkpoint=str(folder / "parts" / "checkpoint-4"))
    own, other = (trained(run.model) for run in (whole, parts))
    assert all(torch.equal(own[name], other[name]) for name in own)
    return own


def by_accelerate(folder: Path) -> dict[str, Tensor]:
    launched()
    # shuffled, accelerate alone does not go on in the same order in several processes
    whole = test_accelerate.Loop(shuffle=False)
    assert isinstance(whole.model, nn.parallel.DistributedDataParallel)
    adapter_checkpoints(whole.accelerator, whole.model)
    whole.epoch()
    whole.accelerator.save_state(str(folder / "state"))
    whole.accelerator.wait_for_everyone()
    whole.epoch()
    parts = test_accelerate.Loop(shuffle=False)
    adapter_checkpoints(parts.accelerator, parts.model)
    parts.accelerator.load_state(str(folder / "state"))
    parts.epoch()
    own, other = trained(whole.model), trained(parts.model)
    assert all(torch.equal(own[name], other[name]) for name in own)
    return own


def test_trainer_in_two_processes(tmp_path: Path) -> None:
    first, second = distributed(by_trainer, tmp_path, folder=tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    checkpoint = tmp_path / "parts" / "checkpoint-8"
    kept = test_transformers.load_file(checkpoint / "model.safetensors")
    assert kept.keys() == first.keys()
    assert all(torch.equal(kept[name], first[name]) for name in kept)
    assert (checkpoint / "adapter-default.safetensors").is_file()


def test_accelerate_in_two_processes(tmp_path: Path) -> None:
    first, second = distributed(by_accelerate, tmp_path, folder=tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept = test_transformers.load_file(tmp_path / "state" / "model.safetensors")
    assert "head.weight" in kept
    assert "body.weight" not in kept
    assert (tmp_path / "state" / "adapter-default.safetensors").is_file()
