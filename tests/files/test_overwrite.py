"""What may be written over: one rule for every verb that writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import peftkit as pk
from peftkit.errors import FileError
from peftkit.files.formats.disk import atomic, atomic_folder, require_output
from tests.support.files import listing, load, write
from tests.support.hands import exact, full, lora
from tests.support.models import net, state

#: a verb -> what it writes to a path, given the folder of inputs and overwrite
VERBS: dict[str, Callable[[Path, Path, bool | None], object]] = {
    "merge": lambda at, out, ow: pk.merge_checkpoint(
        at / "base.safetensors", {at / "one.safetensors": 0.5}, out, overwrite=ow
    ),
    "export": lambda at, out, ow: pk.export(at / "one.safetensors", out, "lycoris", overwrite=ow),
    "convert": lambda at, out, ow: pk.convert(at / "one.safetensors", out, "full", overwrite=ow),
    "resize": lambda at, out, ow: pk.resize(at / "one.safetensors", out, rank=1, overwrite=ow),
    "rescale": lambda at, out, ow: pk.rescale(at / "one.safetensors", 0.5, out, overwrite=ow),
    "combine": lambda at, out, ow: pk.combine(
        {at / "one.safetensors": 1, at / "two.safetensors": 1}, out, overwrite=ow
    ),
    "extract": lambda at, out, ow: pk.extract(
        at / "tuned.safetensors", at / "base.safetensors", out, rank=1, overwrite=ow
    ),
}

#: a verb -> the inputs it must not replace
INPUTS = {
    "merge": ("base", "one"),
    "export": ("one",),
    "convert": ("one",),
    "resize": ("one",),
    "rescale": ("one",),
    "combine": ("one", "two"),
    "extract": ("tuned", "base"),
}


@pytest.fixture
def at(tmp_path: Path) -> Path:
    before = state(net())
    write(tmp_path / "base.safetensors", before)
    write(tmp_path / "tuned.safetensors", {**before, "lin.weight": before["lin.weight"] + exact(12, 8, seed=3)})
    write(tmp_path / "one.safetensors", lora(12, 8, 4, seed=1).keyed("lycoris_lin"))
    write(tmp_path / "two.safetensors", full(12, 8, seed=4).keyed("lycoris_lin"))
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_an_earlier_output_is_replaced_by_default_and_refused_on_demand(verb: str, at: Path) -> None:
    out = at / "out.safetensors"
    VERBS[verb](at, out, False)
    written = out.read_bytes()
    out.write_bytes(b"an earlier output")
    with pytest.raises(FileError, match="is there already: name another output"):
        VERBS[verb](at, out, False)
    assert out.read_bytes() == b"an earlier output"
    VERBS[verb](at, out, None)
    assert out.read_bytes() == written


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in INPUTS.items() for name in names])
def test_no_verb_replaces_an_input_unless_asked(verb: str, name: str, at: Path) -> None:
    source = at / f"{name}.safetensors"
    link, hard = at / "link.safetensors", at / "hard.safetensors"
    link.symlink_to(source)
    os.link(source, hard)
    before = listing(at)
    for out in (source, link, hard, at / "." / source.name):
        for overwrite in (None, False):
            with pytest.raises(FileError, match="one of the inputs"):
                VERBS[verb](at, out, overwrite)
    assert listing(at) == before
    VERBS[verb](at, at / "new.safetensors", None)
    VERBS[verb](at, source, True)
    assert source.read_bytes() == (at / "new.safetensors").read_bytes()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("overwrite", [None, False, True])
def test_a_read_only_output_is_never_replaced(verb: str, overwrite: bool | None, at: Path) -> None:
    out = at / "out.safetensors"
    out.write_bytes(b"precious")
    out.chmod(0o444)
    with pytest.raises(FileError, match="is read-only"):
        VERBS[verb](at, out, overwrite)
    assert out.read_bytes() == b"precious"


def test_save_replaces_its_own_earlier_file(tmp_path: Path) -> None:
    model, out = net(), tmp_path / "own.safetensors"
    pk.wrap(model, "ia3", targets=["lin"])
    model.lin.adapters["default"].gate.data.fill_(0.5)
    pk.save(model, out)
    model.lin.adapters["default"].gate.data.fill_(0.25)
    pk.save(model, out)
    assert load(out)["lin.gate"].unique().tolist() == [0.25]
    with pytest.raises(FileError, match="is there already"):
        pk.save(model, out, overwrite=False)


def test_a_file_in_a_folder_that_is_read_is_an_input(at: Path) -> None:
    folder = at / "model"
    folder.mkdir()
    (at / "base.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(FileError, match=r"part of .*model, which is an input, and would be replaced"):
        pk.extract(at / "tuned.safetensors", folder, folder / "model.safetensors", rank=1)
    pk.extract(at / "tuned.safetensors", folder, folder / "adapter.safetensors", rank=1)


def test_a_folder_is_replaced_on_demand_and_only_if_no_file_is_lost(at: Path) -> None:
    out = at / "peft"
    pk.export(at / "one.safetensors", out, "peft")
    first = listing(out)
    for overwrite in (None, False):
        with pytest.raises(FileError, match="is there already"):
            pk.export(at / "two.safetensors", out, "peft", overwrite=overwrite)
    with pytest.raises(FileError, match="one of the inputs"):
        pk.rescale(out, 2.0, out)
    pk.rescale(out, 2.0, out, overwrite=True)
    assert listing(out).keys() == first.keys() and listing(out) != first
    (out / "notes.txt").write_text("mine")
    before = listing(at)
    with pytest.raises(FileError, match=r"holds notes\.txt, which would be lost"):
        pk.rescale(out, 2.0, out, overwrite=True)
    assert listing(at) == before


def test_a_folder_of_shards_is_not_written_under_the_name_of_a_file(at: Path) -> None:
    folder = at / "model"
    folder.mkdir()
    (at / "base.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(FileError, match="is a folder, and merging into it makes a folder"):
        pk.merge_checkpoint(folder, {at / "one.safetensors": 1}, at / "x.safetensors")
    assert not (at / "x.safetensors").exists()


# -- temporaries ------------------------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
from peftkit.files.formats.disk import atomic, atomic_folder
with atomic(Path(sys.argv[1]) / "file") as file, atomic_folder(Path(sys.argv[1]) / "folder") as folder:
    (folder / "part").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_writers_leave_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _KILLED, tmp_path], check=False, timeout=120)
    stale = sorted(path.name for path in tmp_path.iterdir())
    assert len(stale) == 2 and all(name.startswith(".peftkit.") and name.endswith(".tmp") for name in stale)
    elsewhere = tmp_path / stale[0].replace(stale[0].split(".")[3], "00000000")  # of another host
    elsewhere.touch()
    with atomic(tmp_path / "mine") as file:
        alive = Path(file.name)
        with atomic(tmp_path / "other"):
            assert alive.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([elsewhere.name, "mine", "other"])


def test_nothing_is_left_of_a_block_that_fails(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="none"), atomic(tmp_path / "file"):
        (tmp_path / "none").read_bytes()
    with pytest.raises(FileError, match="none"), atomic_folder(tmp_path / "folder") as folder:
        (folder / "part").write_bytes((tmp_path / "none").read_bytes())
    assert not list(tmp_path.iterdir())


def test_an_output_needs_a_folder_to_be_in(tmp_path: Path) -> None:
    for odd in (tmp_path / "no" / "file", tmp_path / "a\0b"):
        with pytest.raises(FileError, match="there is no folder"):
            require_output(odd)
    assert require_output(tmp_path / "new", [None, net()], False) == tmp_path / "new"
