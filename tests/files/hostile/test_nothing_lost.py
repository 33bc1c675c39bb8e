"""A verb that fails leaves what was there, and no other file."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peftkit as pk
from peftkit.errors import FileError, PeftkitError
from tests.support import corpus
from tests.support.bounds import bounded, put, tuned_base
from tests.support.corpus import GOOD, INDEX, PRECIOUS, Place, ones, pair, safetensors
from tests.support.zoo import train


@contextmanager
def _no_room(size: int) -> Iterator[None]:
    """A disk that takes files of so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Place], Any]] = {
    "save": lambda at: pk.save(_wrapped(), at.out),
    "export": lambda at: pk.export(at.good, at.out, "comfyui", family="own"),
    "export to a folder": lambda at: pk.export(at.good, at.out_folder, "peft"),
    "convert": lambda at: pk.convert(at.good, at.out, "full"),
    "resize": lambda at: pk.resize(at.good, at.out, rank=1),
    "rescale": lambda at: pk.rescale(at.good, 2.0, at.out),
    "combine": lambda at: pk.combine({at.good: 1.0, at.folder / "sound.safetensors ".strip(): 1.0} | _twin(at), at.out),
    "extract": lambda at: pk.extract(tuned_base(at), at.base, at.out, "full"),
    "merge_checkpoint": lambda at: pk.merge_checkpoint(at.base, {at.good: 1.0}, at.out),
    "merge a folder": lambda at: pk.merge_checkpoint(_shards(at), {at.good: 1.0}, at.out_folder),
}


def _wrapped() -> nn.Module:
    model = pair()
    pk.wrap(model, "lora", targets=["a"])
    train(model)
    return model


def _twin(at: Place) -> dict[Path, float]:
    twin = at.folder / "twin.safetensors"
    if not twin.exists():
        twin.write_bytes(GOOD)
    return {twin: 1.0}


def _shards(at: Place) -> Path:
    folder = at.folder / "shards"
    if not folder.exists():
        where = {"a.weight": "1.safetensors", "a.bias": "2.safetensors"}
        one, two = safetensors({"a.weight": ones(12, 8)}), safetensors({"a.bias": ones(12)})
        put(folder, {"1.safetensors": one, "2.safetensors": two, INDEX: corpus.index(where), "config.json": b"{}"})
    return folder


@pytest.mark.parametrize("room", [0, 8, 100, 200])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_nothing_else(writer: str, room: int, at: Place) -> None:
    at.prepare()
    _twin(at), tuned_base(at), _shards(at)
    before = at.listing()
    with _no_room(room), pytest.raises(FileError, match=at.folder.name):
        WRITERS[writer](at)
    assert at.listing() == before
    assert at.out.read_bytes() == PRECIOUS


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failed_rename_leaves_what_was_there_and_nothing_else(
    writer: str, at: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    at.prepare()
    _twin(at), tuned_base(at), _shards(at)
    before = at.listing()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileError, match="the disk is gone"):
        WRITERS[writer](at)
    assert at.listing() == before


@pytest.mark.parametrize("writer", [name for name in WRITERS if "folder" not in name])
@pytest.mark.parametrize("odd", ["a long name", "a folder that is not there", "a folder", "a name with NUL", "a file"])
def test_an_output_that_cannot_be_written_is_refused_by_name(odd: str, writer: str, tmp_path: Path) -> None:
    class Odd(Place):
        @property
        def out(self) -> Path:
            return {
                "a long name": self.folder / ("x" * 240 + ".safetensors"),
                "a folder that is not there": self.folder / "no" / "out.safetensors",
                "a folder": self.folder / "folder.safetensors",
                "a name with NUL": self.folder / "\0.safetensors",
                "a file": self.base / "out.safetensors",
            }[odd]

    Place(tmp_path).prepare()
    at = Odd(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    _twin(at), tuned_base(at)
    before = at.listing()
    if odd == "a long name":  # it is not too long for the file itself
        WRITERS[writer](at)
        assert set(at.listing()) - set(before) == {at.out.name}
        return
    with pytest.raises(PeftkitError):
        WRITERS[writer](at)
    assert at.listing() == before


class Stopped(BaseException):
    """What a user does with Ctrl-C."""


@pytest.mark.parametrize("folder", [False, True])
def test_a_merge_that_is_stopped_leaves_what_was_there_and_nothing_else(folder: bool, at: Place) -> None:
    at.prepare()
    base = _shards(at) if folder else at.base
    before = at.listing()

    def stop(done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        pk.merge_checkpoint(base, {at.good: 1.0}, at.for_model(base), progress=stop)
    assert at.listing() == before
    assert not at.out_folder.exists()


def test_a_base_cut_off_while_it_is_merged_is_refused_by_name(at: Place) -> None:
    """`c` is copied after `a` is merged; by then its bytes are gone."""
    at.prepare()
    size = at.base.stat().st_size

    def cut(done: int, total: int) -> None:
        os.truncate(at.base, size - 100)

    before = {name: stamp for name, stamp in at.listing().items() if name != at.base.name}
    with bounded(), pytest.raises(FileError, match=at.base.name):
        pk.merge_checkpoint(at.base, {at.good: 1.0}, at.out, progress=cut)
    assert {name: stamp for name, stamp in at.listing().items() if name != at.base.name} == before


def test_an_adapter_cut_off_after_it_was_read_is_refused_by_name(at: Place) -> None:
    at.prepare()
    bundle = pk.read(at.good)
    os.truncate(at.good, at.good.stat().st_size - 40)
    with bounded(), pytest.raises(FileError, match=at.good.name):
        dict(bundle.patches)


def test_a_refused_merge_onto_the_base_itself_leaves_the_base(at: Place) -> None:
    at.prepare()
    path = at.folder / "hostile.safetensors"
    path.write_bytes(corpus.KOHYA["up in infinity"])
    before = at.base.read_bytes()
    with pytest.raises(PeftkitError):
        pk.merge_checkpoint(at.base, {path: 1.0}, at.base, overwrite=True)
    assert at.base.read_bytes() == before
    pk.merge_checkpoint(at.base, {at.good: 1.0}, at.base, overwrite=True)
    expected = pair().a.weight.detach() + 0.5 * 2 * torch.ones(12, 8)
    assert torch.allclose(load_file(at.base)["a.weight"], expected)


def test_a_merge_into_the_folder_of_its_base_does_not_copy_itself(at: Place) -> None:
    at.prepare()
    base = _shards(at)
    pk.merge_checkpoint(base, {at.good: 1.0}, base / "merged")
    names = {str(path.relative_to(base / "merged")) for path in (base / "merged").rglob("*")}
    assert names == {"1.safetensors", "2.safetensors", INDEX, "config.json"}
