"""Paths that are no sound file: folders, links, devices, names too long, files that may not be read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import corpus
from tests.support.bounds import bounded, put, require_law
from tests.support.corpus import (
    ADAPTER_VERBS,
    BASE_VERBS,
    CONFIG,
    GOOD,
    INDEX,
    WEIGHTS,
    Place,
    ones,
    outcome,
    safetensors,
)


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _link(target: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.symlink_to(target)
        return path

    return make


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _below_a_file(path: Path) -> Path:
    path.write_bytes(b"")
    return path / path.name


OBJECTS: dict[str, Callable[[Path], Path]] = {
    "nothing": lambda path: path,
    "a pipe": _fifo,
    "an endless device": _link("/dev/zero"),
    "an empty device": _link("/dev/null"),
    "a file that cannot be read": _link("/proc/self/mem"),
    "a link to itself": lambda path: _link(path.name)(path),
    "a link to nothing": _link("nothing"),
    "a folder": _folder,
    "a file below a file": _below_a_file,
    "a name of 300 letters": lambda path: path.with_name("x" * 300 + path.name),
    "a path of 6000 letters": lambda path: path.parent / ("a/" * 3000) / path.name,
    "a name with NUL": lambda path: path.with_name("\0" + path.name),
    "a name of odd bytes": lambda path: path.with_name("\udcff" + path.name),
}


@pytest.mark.parametrize("name", ["hostile.safetensors", "hostile.pt", f"hostile.{INDEX}"])
@pytest.mark.parametrize("case", OBJECTS)
def test_what_is_not_a_file_is_refused_by_name_and_never_blocks(case: str, name: str, pickling: Place) -> None:
    path = OBJECTS[case](pickling.folder / name)
    some = {name: ADAPTER_VERBS[name] for name in ("read", "inspect", "doctor", "load", "merge_checkpoint", "rescale")}
    require_law(path, pickling, some)
    require_law(path, pickling, {name: BASE_VERBS[name] for name in ("merge_checkpoint", "extract")})


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, INDEX, "1.safetensors", "model_index.json", "adapter_model.bin"])
@pytest.mark.parametrize("case", ["a pipe", "an endless device", "a link to itself", "a folder", "a link to nothing"])
def test_what_is_not_a_file_inside_a_folder_is_refused_by_name_and_never_blocks(
    case: str, name: str, pickling: Place
) -> None:
    whole = {**corpus.peft(), INDEX: corpus.index({"a.weight": "1.safetensors"})}
    whole["1.safetensors"] = safetensors({"a.weight": ones(12, 8)})
    if name == "adapter_model.bin":
        del whole[WEIGHTS]
    path = put(pickling.folder / "hostile", {key: data for key, data in whole.items() if key != name})
    OBJECTS[case](path / name)
    some = ("read", "doctor", "load", "merge_checkpoint", "rescale", "resize")
    require_law(path, pickling, {name: ADAPTER_VERBS[name] for name in some})
    if not (path / WEIGHTS).is_dir():
        (path / WEIGHTS).unlink(missing_ok=True)
    require_law(path, pickling, BASE_VERBS)


@contextmanager
def _nobody() -> Iterator[None]:
    """Without the rights of root, to whom no file is closed."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["the file", "its folder", "the configuration"])
def test_a_file_without_permission_is_refused_by_name(closed: str) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o777)
        at = Place(folder).prepare()
        inner = put(folder / "inner", corpus.peft())
        path = inner if closed == "the configuration" else inner / "hostile.safetensors"
        (inner / "hostile.safetensors").write_bytes(GOOD)
        for each in folder.rglob("*"):
            each.chmod(0o777)
        {"the file": path, "its folder": inner, "the configuration": inner / CONFIG}[closed].chmod(0)
        some = {name: ADAPTER_VERBS[name] for name in ("read", "inspect", "doctor", "load", "plan_merge", "convert")}
        bases = {} if path == inner else {name: BASE_VERBS[name] for name in ("merge_checkpoint", "extract")}
        found = {}
        for name, verb in {**some, **bases}.items():
            with _nobody(), bounded():
                found[name] = outcome(verb, path, at)
        assert not any(found.values()), found
    finally:
        for each in (folder, *folder.rglob("*")):
            each.chmod(0o777)
        shutil.rmtree(folder)
