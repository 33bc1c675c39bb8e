"""Names are those of the model as it was written, whatever torch has wrapped around it or around one of its blocks."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import TrainingState
from torch.optim.swa_utils import AveragedModel

import peftkit as pk
from peftkit.errors import UnsupportedLayerError
from peftkit.files.base import of_model
from peftkit.wrapping import walk
from peftkit.wrapping.installed import adapted_modules, installed_adapters
from peftkit.wrapping.sites import sites
from peftkit.wrapping.walk import named_modules, plain_name
from tests.support.zoo import train

Wrap = Callable[[nn.Module], nn.Module]


class Block(nn.Module):
    """A block with an attribute of a wrapper's name, which is no wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 8)
        self.out = nn.Sequential(nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.module(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def fully_sharded(module: nn.Module) -> nn.Module:
    """A wrapper of FSDP1 as far as names go: a real one needs an accelerator."""
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module, wrapper.training_state = module, TrainingState.IDLE
    return wrapper


WRAPPERS: dict[str, Wrap] = {
    "compile": lambda module: torch.compile(module, backend="eager"),
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "checkpoint_wrapper": checkpoint_wrapper,
    "FSDP1": fully_sharded,
    "two": lambda module: torch.compile(nn.DataParallel(module), backend="eager"),
}


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The process group that DistributedDataParallel asks for."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def plain() -> Model:
    torch.manual_seed(0)
    return Model()


def put(wrap: Wrap, where: str, model: nn.Module) -> nn.Module:
    """The model with a wrapper around all of it, or around its second block."""
    if where == "model":
        return wrap(model)
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    blocks[1] = wrap(blocks[1])
    return model


def adapt(model: nn.Module) -> pk.Plan:
    plan = pk.wrap(model, "lora", rank=2)
    train(model)
    return plan


def keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as opened:
        return sorted(opened.keys())


def seen(model: nn.Module, folder: Path) -> dict[str, Any]:
    """All that the library says of a wrapped model, by name, and what its file does to the plain model."""
    folder.mkdir()
    twin, x = plain().eval(), torch.randn(2, 3, 4)
    report = pk.load(twin, pk.save(model, folder / "own.safetensors"))
    exported = {}
    for target in ("lycoris", "peft"):
        path = folder / target
        pk.export(model, path if target == "peft" else path.with_suffix(".safetensors"), target=target)
        exported[target] = keys(
            path / "adapter_model.safetensors" if target == "peft" else path.with_suffix(".safetensors")
        )
    found = {
        "sites": [*sites(model)],
        "adapted": [*adapted_modules(model)],
        "installed": [at.site for at in installed_adapters(model)],
        "state": [*pk.adapter_state_dict(model)],
        "second": pk.plan(model, "loha", targets="blocks.1", name="other", rank=2).modules,
        "file": keys(folder / "own.safetensors"),
        "load": (report.loaded, report.complete),
        "output": twin(x).detach(),
        **exported,
    }
    merged = pk.merge(model)
    return found | {
        "merge": [w.site for w in merged.weights],
        "restored": pk.restore(model),
        "unwrap": pk.unwrap(model),
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The plan and the names of the model that nothing is wrapped around."""
    torch.manual_seed(3)
    model = plain()
    plan = adapt(model)
    torch.manual_seed(3)
    return str(plan), seen(model, tmp_path_factory.mktemp("plain") / "files")


@pytest.mark.parametrize("order", ["wrapper first", "adapters first"])
@pytest.mark.parametrize("where", ["model", "block"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_plain_model(
    wrapper: str, where: str, order: str, expected: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    model: nn.Module = plain()
    if order == "wrapper first":
        model = put(WRAPPERS[wrapper], where, model)
        plan = adapt(model)
    else:
        plan = adapt(model)
        model = put(WRAPPERS[wrapper], where, model)
    torch.manual_seed(3)
    found = seen(model, tmp_path / "files")
    assert str(plan) == expected[0]
    torch.testing.assert_close(found.pop("output"), expected[1]["output"], rtol=0, atol=0)
    assert found == {key: value for key, value in expected[1].items() if key != "output"}


@pytest.mark.parametrize("where", ["model", "block"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_base_in_memory_has_the_names_of_the_plain_model(wrapper: str, where: str) -> None:
    model = put(WRAPPERS[wrapper], where, plain())
    averaged = {"n_averaged", "blocks.1.n_averaged"}  # the wrapper's own
    assert of_model(model).shapes.keys() - averaged == of_model(plain()).shapes.keys()


def test_gradient_flags_come_back_through_another_reference() -> None:
    """What the first wrap froze is known to the model, not to the wrapper that it was called with."""
    model = plain()
    pk.wrap(torch.compile(model, backend="eager"), "lora", rank=2)
    assert not model.stem.weight.requires_grad
    pk.unwrap(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_attribute_of_a_wrappers_name_is_a_name() -> None:
    """Wrappers are known by their class: modules of one's own that are called `module` or `_orig_mod` stay."""
    model = nn.ModuleDict({"module": Block()})
    model.add_module("_orig_mod", nn.Linear(2, 2))
    assert [*sites(model)][:1] == ["module.module"]
    assert [*sites(model)][-1] == "_orig_mod"
    assert plain_name(model, "module.module.weight") == "module.module.weight"
    assert plain_name(nn.DataParallel(model), "module.module.module.weight") == "module.module.weight"


def test_modules_come_in_the_order_of_torch() -> None:
    model = plain()
    model.blocks.append(model.blocks[0])
    for every_name in (False, True):
        by_torch = [name for name, _ in model.named_modules(remove_duplicate=not every_name)]
        assert [name for name, _ in named_modules(model, every_name=every_name)] == by_torch
    before = [name for name, _ in named_modules(model, every_name=True)]
    adapt(model)
    assert [name for name, _ in named_modules(model, every_name=True)] == before, "adapters are not walked"


def test_a_module_and_its_compiled_self_are_one() -> None:
    """The first name is that of the module, and the other selects it too."""
    model = plain()
    model.fast = torch.compile(model.blocks[0], backend="eager")
    assert [*sites(model)] == [*sites(plain())]
    assert (
        pk.plan(model, "lora", targets="fast", rank=2).modules == pk.plan(plain(), "lora", targets="blocks.0").modules
    )


def test_walking_visits_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes to list the adapted modules does not grow with the adapters on them."""
    model = plain()
    for i in range(5):
        pk.wrap(model, "lora", rank=1, name=f"a{i}")
    twin = copy.deepcopy(model)
    visits: list[nn.Module] = []
    wrapped = walk.wrapped

    def counted(module: nn.Module) -> Any:
        visits.append(module)
        return wrapped(module)

    monkeypatch.setattr("peftkit.wrapping.walk.wrapped", counted)
    names = [*adapted_modules(twin)]
    assert len(names) == 5
    assert len(visits) == len([*plain().modules()])


def test_names_import_no_wrapper() -> None:
    """Looking for wrappers loads none of them: an import costs as much as before."""
    script = """
import sys, torch
loaded = set(sys.modules)
from torch import nn
import peftkit as pk
pk.wrap(nn.Sequential(nn.Linear(4, 4)), "lora", rank=2)
heavy = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.algorithms._checkpoint")
new = [name for name in set(sys.modules) - loaded if name.startswith(heavy)]
assert not new, new
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ, timeout=300)


def test_copies_of_data_parallel_for_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies that nn.DataParallel makes for GPUs, here of the CPU; for one device or none it makes none."""
    replication = importlib.import_module("torch.nn.parallel.replicate")

    def copied(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", copied)
    model = plain()
    assert len(nn.parallel.replicate(model, [0, 1])) == 2
    pk.wrap(model, "lora", rank=2)
    with pytest.raises(UnsupportedLayerError, match="use DistributedDataParallel"):
        nn.parallel.replicate(model, [0, 1])
    recurrent = nn.LSTM(4, 4)
    pk.wrap(recurrent, "lora", targets="LSTM", rank=2)
    with pytest.raises(UnsupportedLayerError, match="use DistributedDataParallel"):
        nn.parallel.replicate(recurrent, [0, 1])
