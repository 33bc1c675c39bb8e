"""Files of models that are divided among processes, or that several processes hold whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import FileError, LossyError, UnknownAdapterError
from tests.support.divided import TARGETS, Model, batch, plain, shard
from tests.support.files import header, listing, load
from tests.support.processes import distributed

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "loldu": {"rank": 2},
    "oft": {"block_size": 3},
}
LOSS = 1e-5
STEPS = 2


def wrapped(kind: str, targets: Sequence[str] = TARGETS) -> Model:
    model = plain()
    pk.wrap(model, kind, targets=targets, **KINDS[kind])
    model.head.requires_grad_(True)
    return model


def train(model: nn.Module, dtype: torch.dtype = torch.float32, lr: float = 0.1, steps: int = STEPS) -> list[float]:
    """The losses of some steps of SGD; the same batch on every process."""
    x = batch().to(dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = (model(x).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_file(written: Path, expected: Path) -> None:
    """Tensors within rounding of each other; names, shapes and metadata equal."""
    ours, theirs = load(written), load(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-6, msg=f"{written.name}: {key}")
    assert header(written) == header(expected)


# -- save and export ------------------------------------------------------------------------------------------------


def _train_and_save(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        model = shard(wrapped(kind))
        losses = train(model)
        with torch.no_grad():
            model(batch())  # leaves the parameters of the root whole
        path = pk.save(model, folder / f"{kind}.safetensors", training={"steps": STEPS})
        found[kind] = [losses, path.name, path.is_file()]
    return found


@pytest.mark.processes
def test_a_divided_model_trains_and_saves_as_a_whole_one_does(tmp_path: Path) -> None:
    told = distributed(_train_and_save, tmp_path, folder=tmp_path)
    assert told[0] == told[1]
    for kind, (losses, name, there) in told[0].items():
        assert (name, there) == (f"{kind}.safetensors", True)
        model = wrapped(kind)
        assert losses == pytest.approx(train(model), abs=LOSS), kind
        same_file(tmp_path / name, pk.save(model, tmp_path / f"whole-{kind}.safetensors", training={"steps": STEPS}))
        loaded = plain()
        assert pk.load(loaded, tmp_path / name).complete
        torch.testing.assert_close(loaded.eval()(batch()), model.eval()(batch()), rtol=1e-5, atol=1e-5)


def _wrap_and_load_after(folder: Path) -> dict[str, Any]:
    """Losses of adapters that are wrapped, and loaded, onto a model that is divided already; and what they become."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        model = shard(plain())
        if kind != "oft":
            with torch.no_grad():
                model(batch())
        torch.manual_seed(torch.distributed.get_rank())  # the first process's numbers become everyone's
        pk.wrap(model, kind, targets=TARGETS, **KINDS[kind])
        started = pk.save(model, folder / f"{kind}-start.safetensors", allow_zero=True)
        model(batch()).sum().backward()
        frozen = [n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
        model.zero_grad()
        losses = train(model)
        pk.save(model, folder / f"{kind}.safetensors")
        again = shard(plain())
        pk.load(again, started)
        found[kind] = [losses, train(again), [p.tolist() for p in pk.adapter_parameters(model)], frozen]
    return found


@pytest.mark.processes
def test_adapters_wrapped_or_loaded_after_the_model_is_divided_train_as_those_before(tmp_path: Path) -> None:
    told = distributed(_wrap_and_load_after, tmp_path, folder=tmp_path)
    assert told[0] == told[1]  # the processes stay together, though each sees its own start
    for kind, (wrapped_losses, loaded_losses, _, frozen) in told[0].items():
        assert frozen == []
        model = plain()
        pk.load(model, tmp_path / f"{kind}-start.safetensors")
        expected = train(model.train())
        assert wrapped_losses == pytest.approx(expected, abs=LOSS), kind
        assert loaded_losses == pytest.approx(expected, abs=LOSS), kind
        same_file(tmp_path / f"{kind}.safetensors", pk.save(model, tmp_path / f"whole-{kind}.safetensors"))


def _body_alone(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    """An adapted model of which nothing else trains: fully_shard takes trained parameters of one dtype."""
    model = plain().to(dtype)
    pk.wrap(model, kind, targets=TARGETS, **KINDS[kind])
    return model


#: steps that move the loss by far more than bf16 rounds it
_FAST: dict[str, Any] = {"lr": 5.0, "steps": 4}


def _train_mixed(folder: Path) -> dict[str, list[list[float]]]:
    """Losses in 16 bits: of weights in bf16 under adapters in fp32, and of a policy that casts to bf16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    del folder
    found = {}
    for kind in KINDS:
        narrow, cast = _body_alone(kind, torch.bfloat16), _body_alone(kind)
        fully_shard(cast, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        found[kind] = [train(shard(narrow), torch.bfloat16, **_FAST), train(cast, **_FAST)]
    return found


@pytest.mark.processes
def test_a_divided_model_of_mixed_dtypes_trains_as_a_whole_one_does(tmp_path: Path) -> None:
    told = distributed(_train_mixed, tmp_path, folder=tmp_path)
    assert told[0] == told[1]
    for kind, (narrow, cast) in told[0].items():
        whole = train(_body_alone(kind), **_FAST)
        assert abs(whole[0] - whole[-1]) > 0.02 * whole[0], kind
        assert narrow == pytest.approx(train(_body_alone(kind, torch.bfloat16), torch.bfloat16, **_FAST), rel=0.002)
        assert cast == pytest.approx(whole, rel=0.02), kind


def _write(model: nn.Module, folder: Path, kind: str) -> None:
    pk.save(model, folder / f"{kind}.safetensors")
    pk.save(model, folder / f"{kind}-portable.safetensors", dtype=torch.bfloat16, portable=True)
    pk.export(model, folder / f"{kind}-comfyui.safetensors", "comfyui", family="own", bake=True, extras=False)
    pk.export(model, folder / f"{kind}-peft", "peft", bake=True)


def _write_both(folder: Path) -> int:
    """Files of a model before and after it is divided."""
    for kind in KINDS:
        model = wrapped(kind, ("stem", "body"))  # no other program has a name for rows of a parameter
        generator = torch.Generator().manual_seed(0)
        for parameter in pk.adapter_parameters(model):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if torch.distributed.get_rank() == 0:
            _write(model, folder / "whole", kind)
        _write(shard(model), folder / "divided", kind)
    return 0


@pytest.mark.processes
def test_files_of_a_divided_model_are_those_of_the_whole_one_byte_for_byte(tmp_path: Path) -> None:
    for name in ("whole", "divided"):
        (tmp_path / name).mkdir()
    distributed(_write_both, tmp_path, folder=tmp_path)
    whole, divided = listing(tmp_path / "whole"), listing(tmp_path / "divided")
    assert len(whole) > 4 * len(KINDS)
    assert whole == divided


def _fail(folder: Path) -> list[int]:
    """Whether each call raised the error that was expected, and a whole call works after them."""
    model = shard(wrapped("lora"))
    train(model)
    taken = folder / "taken.safetensors"
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: pk.save(model, taken, overwrite=False), FileError, "is there already"),
        (lambda: pk.save(model, folder / "none" / "a.safetensors"), FileError, "there is no folder"),
        (lambda: pk.save(model, folder / "a.safetensors", "other"), UnknownAdapterError, "other"),
        (lambda: pk.export(model, folder / "a.safetensors", "comfyui"), LossyError, "extras=False"),
        (lambda: pk.save(shard(wrapped("lora")), folder / "a.safetensors"), FileError, "every ΔW is zero"),
    ]
    found = []
    for call, error, words in calls:
        try:
            call()
        except error as raised:
            found.append(int(words in str(raised)))
    return [*found, int(pk.save(model, taken).is_file())]


@pytest.mark.processes
def test_every_process_raises_what_the_first_one_meets(tmp_path: Path) -> None:
    (tmp_path / "taken.safetensors").write_bytes(b"old")
    assert distributed(_fail, tmp_path, folder=tmp_path) == [[1] * 6] * 2
    assert not list(tmp_path.glob("a.*"))


def _break(folder: Path) -> list[str]:
    """What each process says where the first one fails in the middle, with an error of torch."""
    model = shard(wrapped("dora"))
    train(model)
    with mock.patch("peftkit.files.save.samples", side_effect=MemoryError("no room")):
        try:
            pk.save(model, folder / "a.safetensors")
        except (MemoryError, FileError) as error:
            return [f"{type(error).__name__}: {error}"]
    return []


@pytest.mark.processes
def test_no_process_waits_for_a_first_one_that_failed(tmp_path: Path) -> None:
    first, second = distributed(_break, tmp_path, folder=tmp_path)
    assert first == ["MemoryError: no room"]
    assert second == ["FileError: the first process stopped and wrote nothing: MemoryError: no room"]
    assert not list(tmp_path.glob("*.safetensors"))


# -- several processes with the whole model -------------------------------------------------------------------------


def _save_replicas(folder: Path) -> str:
    model = nn.parallel.DistributedDataParallel(wrapped("lora"))
    train(model)
    paths = [pk.save(model, folder / "shared.safetensors") for _ in range(20)]
    torch.distributed.barrier()
    return paths[-1].name


@pytest.mark.processes
def test_replicas_that_write_one_file_at_once_leave_it_whole(tmp_path: Path) -> None:
    assert distributed(_save_replicas, tmp_path, folder=tmp_path) == ["shared.safetensors"] * 2
    model = wrapped("lora")
    train(model)
    same_file(tmp_path / "shared.safetensors", pk.save(model, tmp_path / "whole.safetensors"))
    assert [path.name for path in tmp_path.glob("*shared*")] == ["shared.safetensors"]
