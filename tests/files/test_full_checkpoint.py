"""An adapter out of the state dict of a wrapped model, as Trainer, Lightning and torch.save write it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import (
    FullCheckpointError,
    MergeStateError,
    MismatchError,
    OptionError,
    UnknownAdapterError,
    WrongBaseError,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x))
        return self.head(self.attention(x, x, x, need_weights=False)[0])


X = torch.linspace(-1, 1, 48).reshape(2, 3, 8)


def wrapped(kind: str = "lora", name: str = "style", rank: int = 2) -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    pk.wrap(net, kind, targets=["proj", "attention.q_proj", "attention.out_proj"], rank=rank, name=name)
    return net


def trained(kind: str = "lora", *, head: bool = False) -> Net:
    net = wrapped(kind)
    net.head.requires_grad_(head)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return net


def write(net: nn.Module, path: Path, prefix: str = "") -> Path:
    """A checkpoint in the form that the suffix says: Trainer's, Lightning's, or torch.save's."""
    state = {prefix + key: value.detach().clone() for key, value in net.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".ckpt":
        torch.save({"epoch": 3, "pytorch-lightning_version": "2.6", "state_dict": state, "callbacks": {}}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["lora", "dora", "loldu", "loha"])
@pytest.mark.parametrize(
    ("name", "prefix"),
    [("model.safetensors", ""), ("last.ckpt", "model."), ("last.ckpt", "net.model."), ("x.bin", "module._orig_mod.")],
)
def test_it_is_filled_in(name: str, prefix: str, kind: str, tmp_path: Path) -> None:
    net = trained(kind)
    path = write(net, tmp_path / name, prefix)
    fresh = wrapped(kind)
    parameters = pk.adapter_parameters(fresh)
    report = pk.load(fresh, path, allow_pickle=path.suffix != ".safetensors")
    assert report.complete
    assert report.name == "style"
    assert set(report.loaded) == {"proj", "attention.q_proj", "attention.out_proj"}
    with torch.no_grad():
        assert torch.equal(fresh(X), net(X))
    assert all(a is b for a, b in zip(parameters, pk.adapter_parameters(fresh), strict=True))  # an optimiser's, still
    saved = pk.save(fresh, tmp_path / "alone.safetensors")
    assert saved.read_bytes() == pk.save(net, tmp_path / "theirs.safetensors").read_bytes()


def test_into_a_compiled_model(tmp_path: Path) -> None:
    net = trained()
    path = write(torch.compile(net, backend="eager"), tmp_path / "model.safetensors")  # type: ignore[arg-type]
    fresh = wrapped()
    pk.load(torch.compile(fresh, backend="eager"), path)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(fresh(X), net(X))


def test_what_trained_beside_comes_too_and_is_never_lost_in_silence(tmp_path: Path) -> None:
    net = trained(head=True)
    path = write(net, tmp_path / "model.safetensors")
    fresh = wrapped()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(WrongBaseError, match=r"differ in 2 parameters \(head\.weight, head\.bias\)"):
        pk.load(fresh, path)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    fresh.head.requires_grad_(True)
    report = pk.load(fresh, path)
    assert set(report.extras) == {"head.weight", "head.bias"}
    with torch.no_grad():
        assert torch.equal(fresh(X), net(X))
    alone = wrapped()
    pk.load(alone, path, other_base=True, strength=0.5)
    assert torch.equal(alone.head.weight, before["head.weight"])


def test_a_model_that_is_not_wrapped_is_told_how(tmp_path: Path) -> None:
    path = write(trained(), tmp_path / "model.safetensors")
    for model in (Net(), wrapped(name="other")):
        with pytest.raises(FullCheckpointError, match=r"adapter 'style'.*call wrap\(model, …, name='style'\)"):
            pk.load(model, path)
    for verb in (pk.read, pk.inspect):
        with pytest.raises(FullCheckpointError, match=r"is a full checkpoint: .* with the adapters style among them"):
            verb(path)
    assert pk.doctor(path).code == 2


def test_another_adapter_of_that_name_is_refused_whole(tmp_path: Path) -> None:
    path = write(trained(), tmp_path / "model.safetensors")
    wide = wrapped(rank=4)
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(MismatchError, match=r"is not the one on this model[\s\S]*expected"):
        pk.load(wide, path)
    with pytest.raises(MismatchError, match=r"missing[\s\S]*unexpected"):
        pk.load(wrapped("loha"), path)
    assert all(torch.equal(value, before[key]) for key, value in wide.state_dict().items())
    torch.manual_seed(0)
    fewer = Net().eval()
    pk.wrap(fewer, "lora", targets="proj", rank=2, name="style")
    with pytest.raises(MismatchError, match=r"attention\.adapters\.style\.q_proj\.up: the model has no such adapter"):
        pk.load(fewer, path)
    assert pk.load(fewer, path, strict=False).loaded == ("proj",)


def test_states_and_options_without_a_meaning(tmp_path: Path) -> None:
    net = trained()
    path = write(net, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="route='dense' was given, 'auto' was expected"):
        pk.load(wrapped(), path, route="dense")
    with pytest.raises(UnknownAdapterError, match="holds no adapter 'face'; there is style"):
        pk.load(wrapped(), path, "face")
    pk.merge(net)
    with pytest.raises(MergeStateError, match="'style' is merged into proj"):
        pk.load(net, path)
    two = wrapped()
    pk.wrap(two, "lora", targets="proj", rank=2, name="face")
    both = write(two, tmp_path / "two.safetensors")
    with pytest.raises(UnknownAdapterError, match=r"holds the adapters .*style.*: say which by name="):
        pk.load(wrapped(), both)
    assert pk.load(wrapped(), both, "style", strict=False).loaded
    with pytest.raises(pk.errors.FileError):
        pk.load(wrapped(), write(wrapped(), tmp_path / "last.ckpt"))
