"""accelerate: `save_state` writes no base, and a loop that goes on from `load_state` is the one not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import peftkit as pk
from peftkit.errors import OptionError, UnknownAdapterError, WrongBaseError
from peftkit.integrations.accelerate import adapter_checkpoints


class Net(nn.Module):
    """An adapted layer, a head that trains, and running statistics."""

    def __init__(self, kind: str = "lora") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)
        pk.wrap(self, kind, targets="body", rank=2, **({"dropout": 0.2} if kind == "lora" else {}))
        self.head.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(x))))


class Loop:
    """A training loop under an accelerator."""

    def __init__(self, net: nn.Module | None = None, shuffle: bool = True) -> None:
        self.accelerator = Accelerator(cpu=True)
        net = Net() if net is None else net
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        generator = torch.Generator().manual_seed(1)
        data = DataLoader(TensorDataset(torch.randn(24, 8, generator=generator)), batch_size=4, shuffle=shuffle)
        self.model, self.optimizer, self.scheduler, self.data = self.accelerator.prepare(
            net, optimizer, scheduler, data
        )

    def epoch(self) -> None:
        for (x,) in self.data:
            self.optimizer.zero_grad()
            self.accelerator.backward((self.model(x) - 1).square().mean())
            self.optimizer.step()
            self.scheduler.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_holds_no_base_and_resumes_bit_for_bit(safe: bool, tmp_path: Path) -> None:
    whole = Loop()
    adapter_checkpoints(whole.accelerator, whole.model)
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path / "state"), safe_serialization=safe)
    whole.epoch()

    parts = Loop()
    adapter_checkpoints(parts.accelerator, parts.model)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    parts.accelerator.load_state(str(tmp_path / "state"))
    parts.epoch()
    assert equal(whole.model, parts.model)
    path = tmp_path / "state" / ("model.safetensors" if safe else "pytorch_model.bin")
    kept = load_file(path) if safe else torch.load(path, weights_only=True)
    assert {key for key in kept if ".adapters." not in key} == {
        "head.weight", "head.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    }  # fmt: skip


def test_what_is_not_of_this_model_is_refused(tmp_path: Path) -> None:
    own = Loop()
    adapter_checkpoints(own.accelerator, own.model)
    own.epoch()
    own.accelerator.save_state(str(tmp_path))
    other = Loop(Net("loha"))
    adapter_checkpoints(other.accelerator, other.model)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.accelerator.load_state(str(tmp_path))
    moved = Loop()
    adapter_checkpoints(moved.accelerator, moved.model)
    with torch.no_grad():
        moved.model.body.weight.mul_(2)
    with pytest.raises(WrongBaseError, match="another base"):
        moved.accelerator.load_state(str(tmp_path))


def test_the_adapter_file_of_a_folder_loads_onto_a_fresh_base(tmp_path: Path) -> None:
    own = Loop()
    adapter_checkpoints(own.accelerator, own.model)
    own.epoch()
    own.accelerator.save_state(str(tmp_path))
    fresh = Net()
    pk.unwrap(fresh)
    assert pk.load(fresh, tmp_path / "adapter-default.safetensors").complete
    fresh.norm.load_state_dict(own.model.norm.state_dict())  # buffers are no parameters
    x = torch.randn(3, 8)
    assert torch.equal(fresh.eval()(x), own.model.eval()(x))


def test_another_model_of_the_accelerator_is_saved_whole(tmp_path: Path) -> None:
    own, beside = Loop(), nn.Linear(4, 4)
    prepared = own.accelerator.prepare(beside)
    adapter_checkpoints(own.accelerator, own.model)
    own.accelerator.save_state(str(tmp_path))
    assert load_file(tmp_path / "model_1.safetensors").keys() == {"weight", "bias"}
    assert "body.weight" not in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        prepared.weight.zero_()
    own.accelerator.load_state(str(tmp_path))
    assert prepared.weight.any()


def test_a_full_folder_loads_and_removing_the_handles_ends_it(tmp_path: Path) -> None:
    own = Loop()
    handles = adapter_checkpoints(own.accelerator, own.model)
    own.accelerator.save_state(str(tmp_path / "without"))
    for handle in handles:
        handle.remove()
    own.accelerator.save_state(str(tmp_path / "full"))
    assert "body.weight" in load_file(tmp_path / "full" / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        own.accelerator.load_state(str(tmp_path / "without"))
    adapter_checkpoints(own.accelerator, own.model)
    own.accelerator.load_state(str(tmp_path / "full"))


def test_a_compiled_model(tmp_path: Path) -> None:
    own = Loop()
    own.model = torch.compile(own.model, backend="eager")
    adapter_checkpoints(own.accelerator, own.model)
    own.epoch()
    own.accelerator.save_state(str(tmp_path))
    kept = load_file(tmp_path / "model.safetensors")
    assert "head.weight" in kept and "body.weight" not in kept
    own.model.load_state_dict({f"_orig_mod.{key}": value for key, value in kept.items()})
    with torch.no_grad():
        own.model.head.weight.zero_()
    own.accelerator.load_state(str(tmp_path))
    assert torch.equal(own.model.head.weight, kept["head.weight"])


def test_a_model_that_is_not_its_own_is_refused(tmp_path: Path) -> None:
    own: Any = Loop()
    with pytest.raises(UnknownAdapterError):
        adapter_checkpoints(own.accelerator, nn.Linear(4, 4))
    adapter_checkpoints(own.accelerator, Net())
    with pytest.raises(OptionError, match="was not prepared by"):
        own.accelerator.save_state(str(tmp_path))
