"""Another file over an adapter: the numbers change, the tensors and the compiled code stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftkit as pk
from peftkit.errors import FileError, MergeStateError, MismatchError, UnknownAdapterError, WrongBaseError
from tests.support.zoo import train

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 2},
    "dora": {"rank": 4},
    "loha": {"rank": 4},
    "lokr": {"rank": 2, "factor": 2},
    "loldu": {"rank": 2},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "ia3": {},
    "glora": {"rank": 2},
    "full": {},
}
#: kinds of which a smaller rank is the same ΔW with zeros behind it
PADDED: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 3},
    "dora": {"rank": 2, "alpha": 1},
    "loha": {"rank": 2, "alpha": 1},
    "lokr": {"rank": 1, "factor": 2, "alpha": 2},
}


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()


def adapted(kind: str, seed: int = 1, **options: Any) -> nn.Module:
    net = base()
    pk.wrap(net, kind, **options)
    train(net, seed)
    return net


def state(net: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in net.state_dict().items()}


def unchanged(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_is_the_load_of_the_file_and_compiles_nothing_again(kind: str, tmp_path: Path) -> None:
    other = adapted(kind, 2, **KINDS[kind])
    path = pk.save(other, tmp_path / "other.safetensors")
    net, x = adapted(kind, **KINDS[kind]), torch.randn(3, 16)
    pk.set_strength(net, 0.5)
    net(x)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    compiled(x)
    parameters = [id(p) for p in pk.adapter_parameters(net)]
    report = pk.swap(net, path)
    assert report.loaded == ("0", "2") and report.complete
    assert [id(p) for p in pk.adapter_parameters(net)] == parameters
    pk.set_strength(other, 0.5)
    torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(net(x), other(x))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("kind", PADDED)
def test_a_smaller_rank_and_another_alpha_are_the_same_change(kind: str, tmp_path: Path) -> None:
    other = adapted(kind, 2, **PADDED[kind])
    path = pk.save(other, tmp_path / "other.safetensors")
    net, x = adapted(kind, **KINDS[kind]), torch.randn(3, 16)
    net(x)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    compiled(x)
    pk.swap(net, path)
    torch.testing.assert_close(compiled(x), other(x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    pk.save(net, tmp_path / "again.safetensors")  # and its file is the same change
    fresh = base()
    pk.load(fresh, tmp_path / "again.safetensors")
    assert torch.equal(fresh(x), net(x))


@pytest.mark.parametrize("kind", PADDED)
def test_a_larger_rank_is_refused_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    path = pk.save(adapted(kind, 2, **KINDS[kind]), tmp_path / "other.safetensors")
    net = adapted(kind, **PADDED[kind])
    before = state(net)
    with pytest.raises(MismatchError, match="unwrap that adapter and load"):
        pk.swap(net, path)
    assert unchanged(net, before)


@pytest.mark.parametrize(
    "kind, options, what",
    [
        ("dora", {"rank": 4}, "dora"),
        ("oft", {"block_size": 2}, "block_size=2 in the file, 4 on"),
        ("lora", {"rank": 4, "targets": "0"}, "has nothing for 2"),
    ],
)
def test_another_kind_or_other_weights_are_refused(
    kind: str, options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    path = pk.save(adapted(kind, 2, **options), tmp_path / "other.safetensors")
    net = adapted("oft", block_size=4) if kind == "oft" else adapted("lora", rank=4)
    before = state(net)
    with pytest.raises(MismatchError, match=what):
        pk.swap(net, path)
    assert unchanged(net, before)


def test_options_that_change_the_meaning_are_refused(tmp_path: Path) -> None:
    path = pk.save(adapted("dora", 2, rank=4, axis="in"), tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="axis='in' in the file, 'out' on the model"):
        pk.swap(adapted("dora", rank=4), path)


def test_a_damaged_file_another_base_and_a_merged_model_change_nothing(tmp_path: Path) -> None:
    path = pk.save(adapted("lora", 2, rank=4), tmp_path / "other.safetensors")
    net = adapted("lora", rank=4)
    before = state(net)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FileError):
        pk.swap(net, tmp_path / "cut.safetensors")
    with pytest.raises(UnknownAdapterError):
        pk.swap(net, path, "style")
    assert unchanged(net, before)
    elsewhere = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    pk.wrap(elsewhere, "lora", rank=4)
    with pytest.raises(WrongBaseError):
        pk.swap(elsewhere, path)
    pk.swap(elsewhere, path, other_base=True)
    pk.merge(net)
    with pytest.raises(MergeStateError, match="restore"):
        pk.swap(net, path)
    pk.restore(net)
    assert unchanged(net, before)


def test_numbers_that_the_dtype_of_the_model_cannot_hold_are_refused(tmp_path: Path) -> None:
    other = adapted("lora", 2, rank=2)
    with torch.no_grad():
        pk.adapter_parameters(other)[0].mul_(1e9)
    path = pk.save(other, tmp_path / "other.safetensors")
    net = base()
    pk.wrap(net, "lora", rank=2, dtype=torch.float16)
    before = state(net)
    with pytest.raises(MismatchError, match=r"not finite as torch\.float16"):
        pk.swap(net, path)
    assert unchanged(net, before)


def test_what_trained_beside_the_file_comes_along_and_goes_with_it(tmp_path: Path) -> None:
    net = base()
    pk.wrap(net, "lora", rank=2, targets="0")
    train(net, 1)
    other = copy.deepcopy(net)
    train(other, 2)
    other[2].requires_grad_(True)
    with torch.no_grad():
        other[2].weight.mul_(2)
    pk.save(net, tmp_path / "first.safetensors")
    pk.save(other, tmp_path / "second.safetensors")
    x, before = torch.randn(3, 16), net(torch.ones(16))
    assert pk.swap(net, tmp_path / "second.safetensors").extras == ("2.weight", "2.bias")
    assert torch.equal(net(x), other(x))
    pk.swap(net, tmp_path / "first.safetensors")
    assert torch.equal(net(torch.ones(16)), before)
    pk.unwrap(net)
    assert torch.equal(net(x), base()(x))


def test_a_file_of_another_program_swaps_in(tmp_path: Path) -> None:
    other = adapted("lora", 2, rank=2)
    pk.export(other, tmp_path / "peft", target="peft")
    net, x = adapted("lora", rank=4), torch.randn(3, 16)
    pk.swap(net, tmp_path / "peft")
    torch.testing.assert_close(net(x), other(x))
