"""Whatever bytes a file holds, it is read right or refused by name: no other error, no hang, no code, nothing left.

The files are those of tests/support/corpus.py and mutations of sound ones. What a review of the functions on files
found is at the end.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.cli import files as cli
from peftkit.errors import FileError, PeftkitError, WrongBaseError
from peftkit.files.formats import container
from tests.support import corpus
from tests.support.corpus import (
    ADAPTER_VERBS,
    BASE_VERBS,
    CONFIG,
    GOOD,
    INDEX,
    LORA,
    PICKLE_VERBS,
    PRECIOUS,
    WEIGHTS,
    Entry,
    Files,
    Place,
    Verb,
    net,
    ones,
    outcome,
    safetensors,
)
from tests.support.paths import ROOT
from tests.support.zoo import ADAPTERS, train

#: seconds of the processor that a verb may take on a small file, and of the clock before it counts as hung
SECONDS, HUNG = 2.0, 10.0


class Hung(BaseException):
    """Nothing of the library catches this."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hung if the block blocks, and AssertionError if it takes too much of the processor."""

    def stop(number: int, frame: object) -> None:
        del number, frame
        raise Hung(f"more than {HUNG:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HUNG)
    start = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    took = time.process_time() - start
    assert took < SECONDS, f"{took:.1f} seconds"


def wrongs(path: Path, at: Place, verbs: Mapping[str, Verb]) -> dict[str, str]:
    """Verb -> what is wrong with what it does to a hostile file."""
    found: dict[str, str] = {}
    for name, verb in verbs.items():
        at.prepare()
        shutil.rmtree(at.out_folder, ignore_errors=True)
        try:
            with bounded():
                wrong = outcome(verb, path, at)
        except (AssertionError, Hung) as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            found[name] = wrong
    return found


def require_law(path: Path, at: Place, verbs: Mapping[str, Verb]) -> None:
    found = wrongs(path, at, verbs)
    by_wrong: dict[str, list[str]] = {}
    for name, wrong in found.items():
        by_wrong.setdefault(wrong, []).append(name)
    assert not found, "\n" + "\n".join(f"{', '.join(names)}: {wrong}" for wrong, names in by_wrong.items())


def put(folder: Path, content: Files) -> Path:
    folder.mkdir(parents=True)
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """What is built once, on first use, is no file's doing."""
    with tempfile.TemporaryDirectory() as folder:
        at = Place(Path(folder)).prepare()
        for verb in (*ADAPTER_VERBS.values(), *BASE_VERBS.values()):
            outcome(verb, at.good, at)


@pytest.fixture
def at(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def pickling(tmp_path: Path) -> Place:
    return Place(tmp_path, allow_pickle=True)


# -- the corpus --------------------------------------------------------------------------------------------------------


def test_a_sound_file_passes_through_every_verb(at: Place) -> None:
    """The law below is not kept by refusing all."""
    path = at.folder / "other.safetensors"
    path.write_bytes(GOOD)
    for verb in ADAPTER_VERBS.values():
        at.prepare()
        shutil.rmtree(at.out_folder, ignore_errors=True)
        verb(path, at)
    tuned = _tuned(at)
    for name, verb in BASE_VERBS.items():
        if name != "extract from itself":
            verb(tuned, at)


@pytest.mark.parametrize("case", corpus.CONTAINERS)
def test_a_damaged_container_is_refused_by_name(case: str, at: Place) -> None:
    path = at.folder / "hostile.safetensors"
    path.write_bytes(corpus.CONTAINERS[case])
    few = ("read", "inspect", "doctor", "load", "merge_checkpoint", "rescale")
    require_law(path, at, {name: ADAPTER_VERBS[name] for name in few})
    few = ("merge_checkpoint", "merge in another dtype", "extract from itself")
    require_law(path, at, {name: BASE_VERBS[name] for name in few})


@pytest.mark.parametrize("case", corpus.KOHYA)
def test_a_malformed_adapter_is_read_right_or_refused_by_name(case: str, at: Place) -> None:
    path = at.folder / "hostile.safetensors"
    path.write_bytes(corpus.KOHYA[case])
    require_law(path, at, ADAPTER_VERBS)


@pytest.mark.parametrize("case", corpus.NATIVE)
def test_a_native_header_of_wrong_types_and_sizes_is_read_right_or_refused_by_name(case: str, at: Place) -> None:
    path = at.folder / "hostile.safetensors"
    path.write_bytes(corpus.NATIVE[case])
    few = ("read", "inspect", "doctor", "load", "merge_checkpoint", "convert", "convert on a base", "rescale")
    require_law(path, at, {name: ADAPTER_VERBS[name] for name in few})


@pytest.mark.parametrize("case", corpus.PEFT)
def test_a_malformed_folder_of_peft_is_read_right_or_refused_by_name(case: str, at: Place) -> None:
    path = put(at.folder / "hostile", corpus.PEFT[case])
    few = ("read", "doctor", "load", "merge_checkpoint", "convert on a base", "rescale")
    require_law(path, at, {name: ADAPTER_VERBS[name] for name in few})


@pytest.mark.parametrize("case", corpus.BASES)
def test_an_odd_checkpoint_is_merged_right_or_refused_by_name(case: str, at: Place) -> None:
    path = at.folder / "hostile.safetensors"
    path.write_bytes(corpus.BASES[case])
    require_law(path, at, BASE_VERBS)


@pytest.mark.parametrize("case", corpus.BASE_FOLDERS)
def test_a_folder_of_shards_cannot_name_other_files_or_be_inconsistent(case: str, at: Place) -> None:
    require_law(put(at.folder / "hostile", corpus.BASE_FOLDERS[case]), at, BASE_VERBS)


# -- pickles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", corpus.pickles())
def test_a_pickle_is_read_as_plain_tensors_or_refused_by_name(case: str, pickling: Place) -> None:
    path = pickling.folder / "hostile.pt"
    path.write_bytes(corpus.pickles()[case])
    require_law(path, pickling, PICKLE_VERBS)


@pytest.mark.parametrize("name", ["hostile.pt", "hostile.ckpt", "hostile.bin", "hostile.pth", "hostile.safetensors"])
@pytest.mark.parametrize("case", corpus.evil(Path()))
def test_no_pickle_is_ever_executed(case: str, name: str, at: Place, pickling: Place) -> None:
    marker = at.folder / "executed"
    path = at.folder / name
    path.write_bytes(corpus.evil(marker)[case])
    some = {"read": ADAPTER_VERBS["read"], "merge": BASE_VERBS["merge_checkpoint"], "extract": BASE_VERBS["extract"]}
    for place in (at, pickling):
        for verb in some.values():
            with pytest.raises(FileError):
                verb(path, place.prepare())
        require_law(path, place, some)
    assert not marker.exists(), "the pickle was executed"


def test_a_pickle_inside_a_folder_is_never_executed(at: Place, pickling: Place) -> None:
    marker = at.folder / "executed"
    bad = corpus.evil(marker)["an archive"]
    adapter = put(at.folder / "adapter", {CONFIG: corpus.PEFT["no weights"][CONFIG], "adapter_model.bin": bad})
    base = put(at.folder / "base", {"pytorch_model.bin": bad})
    pipeline = put(at.folder / "pipeline", {"model_index.json": b"{}", "unet/model.bin": bad})
    for place in (at, pickling):
        require_law(adapter, place, {"read": ADAPTER_VERBS["read"], "plan_merge": ADAPTER_VERBS["plan_merge"]})
        for folder in (base, pipeline):
            require_law(folder, place, BASE_VERBS)
    assert not marker.exists(), "the pickle was executed"


@pytest.mark.parametrize("key", ["a", "epoch", "optimizer"])
@pytest.mark.parametrize("value", [{"b": ones(1)}, [ones(1)], "text", 5])
def test_what_a_pickle_holds_beside_tensors_is_never_dropped_in_silence(key: str, value: Any, pickling: Place) -> None:
    """Tensors inside another object are not read, so a file that has them is refused; mere facts may go."""
    path = pickling.folder / "hostile.pt"
    path.write_bytes(corpus.saved({**LORA, key: value}))
    if isinstance(value, (dict, list)):
        with pytest.raises(FileError, match=r"hostile\.pt"):
            pk.read(path, allow_pickle=True)
    else:
        assert list(pk.read(path, allow_pickle=True).patches) == ["a"]


# -- what is not a file ------------------------------------------------------------------------------------------------


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


# -- mutations of sound files ------------------------------------------------------------------------------------------


@cache
def sound() -> dict[str, bytes]:
    """Files of several formats and kinds, for `Net`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        found = {"kohya lora": GOOD, "base": corpus.model_file(net())}
        for case in ("lora", "loha tucker", "lokr", "dora", "oft", "loldu", "ia3 in", "glora"):
            model = net()
            targets = ["a"] if case == "glora" else ["a", "c"] if "tucker" not in case else ["c"]
            pk.wrap(model, ADAPTERS[case].kind, targets=targets, **ADAPTERS[case].options)
            train(model)
            pk.save(model, path)
            found[f"native {case}"] = path.read_bytes()
            if case not in ("loldu", "glora", "ia3 in"):
                pk.export(model, path, "lycoris")
                found[f"kohya {case}"] = path.read_bytes()
    return found


FUZZED = ("read", "inspect", "doctor", "load", "load loosely", "merge_checkpoint", "rescale")
ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 8, 12, 64, 2**31, 2**62, 2**63, 2**80, 10**400, 0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "a", "F32", "F16", "I64", "\0", "\ud800", "lora", "dora", [], [0], [[]]),
    *([1, 2], {}, {"a": 1}, {"rank": 2}, [8, 12, [], 1], "9" * 5000, "(", "(a+)+$"),
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, (*path, key))


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(nodes(value))))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how, key = draw(st.sampled_from(("replace", "replace", "remove", "double", "rename"))), path[-1]
        if how == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            others = ["", "a", "x.alpha", "__metadata__", "rank", f"{key}.", f"{key}x", *parent]
            parent[draw(st.sampled_from(others))] = copy.deepcopy(parent[key]) if how == "double" else parent.pop(key)
    return value


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def _require_law_of(content: bytes | Files, verbs: Mapping[str, Verb], name: str = "hostile.safetensors") -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = Place(Path(folder))
        path = at.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            put(path, content)
        require_law(path, at, verbs)


def _adapter_verbs(*names: str) -> dict[str, Verb]:
    return {name: ADAPTER_VERBS[name] for name in names}


@fuzz(120)
@given(st.data())
def test_a_file_with_other_bytes_is_read_right_or_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(sound())))
    content = bytearray(sound()[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content) - 1, 900)) | st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(("set", "set", "set", "remove", "insert", "cut")))
        if how == "set":
            content[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789",:{}[]'))
        elif how == "remove":
            del content[at : at + data.draw(st.integers(1, 9))]
        elif how == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif at:
            del content[at:]
    verbs = BASE_VERBS if name == "base" else _adapter_verbs(*FUZZED)
    _require_law_of(bytes(content), verbs)


@fuzz(150)
@given(st.data())
def test_a_file_with_another_header_is_read_right_or_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(sound())))
    head, rest = corpus.header_of(sound()[name])
    changed = data.draw(edited(head))
    content = corpus.with_header(json.dumps(changed).encode(), rest)
    _require_law_of(content, BASE_VERBS if name == "base" else _adapter_verbs(*FUZZED))


@fuzz(250)
@given(st.data())
def test_a_native_header_that_says_something_else_is_read_right_or_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in sorted(sound()) if name.startswith("native")]))
    head, rest = corpus.header_of(sound()[name])
    changed = data.draw(edited(json.loads(head["__metadata__"]["peftkit"])))
    head["__metadata__"]["peftkit"] = json.dumps(changed)
    _require_law_of(corpus.with_header(json.dumps(head).encode(), rest), _adapter_verbs(*FUZZED))


_CONFIGS: tuple[tuple[dict[str, Any], dict[str, Entry]], ...] = (
    (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"a": 1}, "rank_pattern": {"a": 2}},
        {f"base_model.model.a.lora_{x}.weight": ones(*s) for x, s in (("B", (12, 2)), ("A", (2, 8)))},
    ),
    (
        {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "coft": True, "eps": 1e-5, "num_cayley_neumann_terms": 5},
        {"base_model.model.a.oft_R.weight": ones(2, 6, by=0.1)},
    ),
    (
        {"peft_type": "LOKR", "r": 2, "alpha": 2, "alpha_pattern": {}, "rank_pattern": {"a": 2}},
        {"base_model.model.a.lokr_w1": ones(2, 2), "base_model.model.a.lokr_w2": ones(6, 4)},
    ),
)


@fuzz(100)
@given(st.data())
def test_another_configuration_of_peft_is_read_right_or_refused_by_name(data: st.DataObject) -> None:
    config, tensors = data.draw(st.sampled_from(_CONFIGS))
    verbs = _adapter_verbs("read", "doctor", "load", "merge_checkpoint")
    _require_law_of(corpus.peft(data.draw(edited(config)), tensors), verbs, "hostile")


@fuzz(50)
@given(st.data())
def test_another_index_is_followed_right_or_refused_by_name(data: st.DataObject) -> None:
    where = {"a.weight": "1.safetensors", "a.bias": "2.safetensors"}
    shards = {
        "1.safetensors": safetensors({"a.weight": ones(12, 8)}),
        "2.safetensors": safetensors({"a.bias": ones(12)}),
    }
    changed = data.draw(edited(json.loads(corpus.index(where))))
    some = {name: BASE_VERBS[name] for name in ("merge_checkpoint", "extract from itself")}
    _require_law_of({**shards, INDEX: json.dumps(changed).encode()}, some, "hostile")


# -- memory and time ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[corpus.Measured]:
    """Every bomb, in a process that may use little more than it has."""
    folder = tmp_path_factory.mktemp("bombs")
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.corpus", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    shutil.rmtree(folder)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [corpus.Measured(**one) for one in json.loads(ran.stdout)]


@pytest.mark.parametrize("bomb", corpus.bombs())
def test_a_small_file_that_claims_to_be_large_takes_little_memory_and_time(
    bomb: str, measured: list[corpus.Measured]
) -> None:
    for one in measured:
        if one.bomb == bomb:
            assert one.wrong is None, f"{one.verb}: {one.wrong}"
            assert one.seconds < SECONDS + one.size / 10e6, f"{one.verb}: {one.seconds:.1f} s for {one.size} bytes"
            allowed = 200e6 + 20 * one.size
            assert one.grown < allowed, f"{one.verb}: {one.grown / 1e6:.0f} MB for {one.size} bytes"


# -- nothing is lost, nothing is left ----------------------------------------------------------------------------------


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
    "export": lambda at: pk.export(at.good, at.out, "comfyui"),
    "export to a folder": lambda at: pk.export(at.good, at.out_folder, "peft"),
    "convert": lambda at: pk.convert(at.good, at.out, "full"),
    "resize": lambda at: pk.resize(at.good, at.out, rank=1),
    "rescale": lambda at: pk.rescale(at.good, 2.0, at.out),
    "combine": lambda at: pk.combine({at.good: 1.0, at.folder / "sound.safetensors ".strip(): 1.0} | _twin(at), at.out),
    "extract": lambda at: pk.extract(_tuned(at), at.base, at.out, "full"),
    "merge_checkpoint": lambda at: pk.merge_checkpoint(at.base, {at.good: 1.0}, at.out),
    "merge a folder": lambda at: pk.merge_checkpoint(_shards(at), {at.good: 1.0}, at.out_folder),
}


def _wrapped() -> nn.Module:
    model = net()
    pk.wrap(model, "lora", targets=["a"])
    train(model)
    return model


def _twin(at: Place) -> dict[Path, float]:
    twin = at.folder / "twin.safetensors"
    if not twin.exists():
        twin.write_bytes(GOOD)
    return {twin: 1.0}


def _tuned(at: Place) -> Path:
    tuned = at.folder / "tuned.safetensors"
    if not tuned.exists():
        model = net()
        with torch.no_grad():
            model.a.weight.add_(1)
        tuned.write_bytes(corpus.model_file(model))
    return tuned


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
    _twin(at), _tuned(at), _shards(at)
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
    _twin(at), _tuned(at), _shards(at)
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
    _twin(at), _tuned(at)
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
        pk.merge_checkpoint(at.base, {path: 1.0}, at.base)
    assert at.base.read_bytes() == before
    pk.merge_checkpoint(at.base, {at.good: 1.0}, at.base)
    expected = net().a.weight.detach() + 0.5 * 2 * torch.ones(12, 8)
    assert torch.allclose(load_file(at.base)["a.weight"], expected)


def test_a_merge_into_the_folder_of_its_base_does_not_copy_itself(at: Place) -> None:
    at.prepare()
    base = _shards(at)
    pk.merge_checkpoint(base, {at.good: 1.0}, base / "merged")
    names = {str(path.relative_to(base / "merged")) for path in (base / "merged").rglob("*")}
    assert names == {"1.safetensors", "2.safetensors", INDEX, "config.json"}


# -- the command line --------------------------------------------------------------------------------------------------

_NAMES = {
    "markup": "a[/red]",
    "a tag": "a[bold]x",
    "escapes": "a\x1b]0;x\x07\x1b[2J",
    "a surrogate": "a\ud800",
    "a line": "a\nb",
}


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("stray", [False, True])
@pytest.mark.parametrize(
    "command", ["inspect", "inspect --json", "doctor", "doctor --json", "diff", "plan", "convert", "rescale"]
)
def test_the_command_line_shows_any_name_and_never_a_traceback(
    command: str, stray: bool, name: str, at: Place, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    path = at.prepare().folder / "hostile.safetensors"
    tensors = {key.replace("a.", f"{_NAMES[name]}.", 1): entry for key, entry in LORA.items()}
    path.write_bytes(safetensors({**tensors, _NAMES[name]: ones(1)} if stray else tensors))
    verb, *options = command.split()
    others = {
        "diff": [path],
        "convert": ["-k", "lora", "-o", at.out],
        "rescale": ["0.5", "-o", at.folder / "new.safetensors"],
    }
    words = [verb, *([at.base] if verb == "plan" else []), path, *others.get(verb, []), *options]
    monkeypatch.setattr(sys, "argv", ["peftkit", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.run()
    shown = capfdbinary.readouterr()
    assert stopped.value.code in (0, 1, 2)
    assert b"\x1b" not in shown.out + shown.err, "a name in a file can move the cursor of the terminal"
    if name == "a tag" and verb == "inspect" and not stray:
        assert b"[bold]x" in shown.out, "a name in a file is taken for markup"


# -- what a review found -----------------------------------------------------------------------------------------------


def _saved(at: Path, kind: str, model: nn.Module | None = None, **options: Any) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of `Net` in this library's format, and its ΔW."""
    model = net() if model is None else model
    portable, targets = options.pop("portable", False), options.pop("targets", ["a"])
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    pk.wrap(model, kind, targets=targets, **options)
    train(model, seed=options.get("rank", 3))
    pk.save(model, at, portable=portable)
    pk.merge(model)
    after = {name: t.detach() for name, t in model.state_dict().items() if name in before}
    return at, {name: after[name] - before[name] for name in before}


def test_files_bound_to_their_base_are_not_compared_without_it(tmp_path: Path) -> None:
    """LoLDU without its factors says nothing of ΔW; two of them once were 'equal'."""
    one, _ = _saved(tmp_path / "one.safetensors", "loldu", rank=4)
    two, _ = _saved(tmp_path / "two.safetensors", "loldu", rank=3)
    for verb in (lambda: pk.diff(one, two), lambda: pk.convert(one, tmp_path / "x.safetensors", "lora")):
        with pytest.raises(PeftkitError, match="base"):
            verb()


@pytest.mark.parametrize("verb", ["convert", "export", "diff", "combine", "resize"])
def test_another_base_than_a_file_was_trained_on_is_refused_wherever_it_decides_the_numbers(
    verb: str, tmp_path: Path
) -> None:
    path, _ = _saved(tmp_path / "bound.safetensors", "loldu", rank=4)
    twin = shutil.copy(path, tmp_path / "twin.safetensors")
    torch.manual_seed(7)
    other, out = corpus.Net(), tmp_path / "out.safetensors"
    base = tmp_path / "other.safetensors"
    base.write_bytes(corpus.model_file(other))
    verbs: dict[str, Callable[[], Any]] = {
        "convert": lambda: pk.convert(path, out, "lora", base=other),
        "export": lambda: pk.export(path, out, "lycoris", base=base),
        "diff": lambda: pk.diff(path, twin, base=base),
        "combine": lambda: pk.combine({path: 1.0, twin: 1.0}, out, base=base),
        "resize": lambda: pk.resize(path, out, rank=1, base=base),
    }
    with pytest.raises(WrongBaseError, match=path.name):
        verbs[verb]()


@pytest.mark.parametrize("verb", ["convert", "resize", "combine"])
def test_an_adapter_of_a_transposed_convolution_stays_one_or_is_refused(verb: str, tmp_path: Path) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.ConvTranspose2d(8, 8, 3)

    torch.manual_seed(0)
    model, base, out = Up(), tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    base.write_bytes(corpus.model_file(model))
    path, truth = _saved(tmp_path / "up.safetensors", "lora", model, rank=2, targets=["t"])
    twin = shutil.copy(path, tmp_path / "twin.safetensors")
    verbs: dict[str, Callable[[], Any]] = {
        "convert": lambda: pk.convert(path, out, "lora"),
        "resize": lambda: pk.resize(path, out, rank=2),
        "combine": lambda: pk.combine({path: 0.5, twin: 0.5}, out),
    }
    refusal = ""
    try:
        verbs[verb]()
    except PeftkitError as error:
        refusal = str(error)
    if refusal:
        assert "transposed" in refusal
        return
    pk.merge_checkpoint(base, {out: 1.0}, tmp_path / "merged.safetensors")
    moved = load_file(tmp_path / "merged.safetensors")["t.weight"] - load_file(base)["t.weight"]
    assert torch.allclose(moved, truth["t.weight"], atol=1e-5)


def test_layers_that_a_file_fuses_do_not_share_their_factors(tmp_path: Path) -> None:
    """One `lora_down` for q, k and v; trained on, each has its own."""
    model = nn.Module()
    block = nn.Module()
    block.attn = nn.Module()
    for name in ("to_q", "to_k", "to_v"):
        block.attn.add_module(name, nn.Linear(1536, 1536, bias=False))
    model.transformer_blocks = nn.ModuleList([block])
    path, fused = tmp_path / "fused.safetensors", "lora_unet_joint_blocks_0_x_block_attn_qkv"
    path.write_bytes(
        safetensors({f"{fused}.lora_up.weight": ones(4608, 1), f"{fused}.lora_down.weight": ones(1, 1536)})
    )
    pk.load(model, path)
    memory = [parameter.data_ptr() for parameter in pk.adapter_parameters(model)]
    assert len(memory) == 6
    assert len(set(memory)) == 6, "two adapters train the same memory"


@pytest.mark.parametrize(
    "more",
    [
        {"a.lora_B.weight": ones(12, 2, by=5.0), "a.lora_A.weight": ones(2, 8)},
        {"base_model.model.a.alpha": torch.tensor(7.0)},
        {"base_model.model.a.diff_b": ones(12)},
        {"base_model.model.a.w_norm": ones(12)},
    ],
    ids=["a module twice", "an alpha", "a change of a bias", "a change of a norm"],
)
def test_no_tensor_of_a_folder_of_peft_is_dropped_in_silence(more: dict[str, Entry], tmp_path: Path) -> None:
    pair = {f"base_model.model.a.lora_{x}.weight": ones(*s) for x, s in (("B", (12, 2)), ("A", (2, 8)))}
    path = put(tmp_path / "hostile", corpus.peft(tensors={**pair, **more}))
    with pytest.raises(FileError, match="hostile"):
        dict(pk.read(path).patches)


@pytest.mark.parametrize(
    "config", [{"r": 7}, {"r": -1}, {"rank_pattern": {"a": 9}}, {"use_dora": True}, {"use_rslora": "no"}]
)
def test_a_configuration_of_peft_that_contradicts_its_tensors_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT itself cannot load such a folder; the scale would be a guess."""
    path = put(tmp_path / "hostile", corpus.peft(**config))
    with pytest.raises(FileError, match="hostile"):
        dict(pk.read(path).patches)


@pytest.mark.parametrize(
    "content",
    [
        corpus.NATIVE["DoRA with too few magnitudes"],
        corpus.NATIVE["oft with {'block_size': 0}"],
        corpus.NATIVE["loldu with {'rank': 2, 'epsilon': -1}"],
        corpus.NATIVE["LoLDU with an order of floats"],
        corpus.NATIVE["fingerprints of NaN"],
        corpus.NATIVE["a weight in two groups"],
        corpus.KOHYA["PEFT's magnitudes of another size"],
        corpus.KOHYA["OFT with too few factors"],
        corpus.KOHYA["OFT of other blocks than squares"],
        corpus.KOHYA["magnitudes around OFT"],
        corpus.KOHYA["GLoRA in no layout"],
        corpus.KOHYA["LoKr of nothing"],
        corpus.KOHYA["no columns"],
        corpus.KOHYA["a gate of nothing"],
        corpus.KOHYA["a change of a bias of NaN"],
    ],
    ids=range(15),
)
def test_the_doctor_does_not_call_sound_what_cannot_be_loaded_anywhere(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    assert pk.doctor(path).code == 2


@pytest.mark.parametrize("size", [1e22, 1e-26])
def test_a_change_is_not_called_dead_for_its_size(size: float, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    down = torch.zeros(2, 8)
    down[0, 0] = 1.0
    path.write_bytes(safetensors({"a.lora_up.weight": ones(12, 2, by=size), "a.lora_down.weight": down}))
    (module,) = pk.inspect(path).modules
    assert module.problem == ""
    assert module.norm == pytest.approx(size * 12**0.5, rel=1e-5)


def test_an_extracted_projection_goes_back_where_it_came_from(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.MultiheadAttention(8, 2)

    torch.manual_seed(0)
    model, files = Attention(), [tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "found", "back")]
    files[0].write_bytes(corpus.model_file(model))
    with torch.no_grad():
        model.m.in_proj_weight.add_(torch.randn(24, 1) @ torch.randn(1, 8))
    files[1].write_bytes(corpus.model_file(model))
    pk.extract(files[1], files[0], files[2], "full")
    pk.merge_checkpoint(files[0], {files[2]: 1.0}, files[3])
    assert torch.allclose(load_file(files[3])["m.in_proj_weight"], model.m.in_proj_weight.detach(), atol=1e-6)


def test_a_combined_file_names_all_its_modules_in_one_way(tmp_path: Path) -> None:
    """A module only the second file has does not keep the second file's spelling."""
    kohya, diffusers, out = (tmp_path / f"{name}.safetensors" for name in ("kohya", "diffusers", "out"))
    one, two = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.1.proj_in"
    shapes = {"up": (320, 1, 1, 1), "down": (1, 320, 1, 1)}
    spelled = {"up": "lora_B", "down": "lora_A"}
    kohya.write_bytes(
        safetensors({f"lora_unet_{one.replace('.', '_')}.lora_{x}.weight": ones(*s) for x, s in shapes.items()})
    )
    diffusers.write_bytes(safetensors({f"unet.{two}.{spelled[x]}.weight": ones(*s) for x, s in shapes.items()}))
    pk.combine({kohya: 1.0, diffusers: 1.0}, out)
    assert {key.partition(".")[0] for key in container.read(out).infos} == {
        f"lora_unet_{path.replace('.', '_')}" for path in (one, two)
    }


def test_a_rescaled_file_keeps_no_hash_of_what_it_was(tmp_path: Path) -> None:
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    stale = {"modelspec.hash_sha256": "0x0", "sshs_model_hash": "0", "sshs_legacy_hash": "0"}
    path.write_bytes(safetensors(LORA, {**stale, "ss_output_name": "x"}))
    pk.rescale(path, 0.5, out)
    assert dict(pk.read(out).metadata) == {"ss_output_name": "x"}


@pytest.mark.parametrize("verb", ["convert", "resize", "rescale", "combine", "diff", "export", "doctor"])
def test_every_remedy_that_an_error_names_can_be_taken(verb: str, tmp_path: Path) -> None:
    """A file with α = 0 asks for alpha_zero=; whoever says so must take it."""
    path, good, out = (tmp_path / f"{name}.safetensors" for name in ("zero", "good", "out"))
    path.write_bytes(safetensors({**LORA, "a.alpha": torch.tensor(0.0)}))
    good.write_bytes(GOOD)
    verbs: dict[str, Callable[..., Any]] = {
        "convert": lambda **k: pk.convert(path, out, "lora", **k),
        "resize": lambda **k: pk.resize(path, out, rank=1, **k),
        "rescale": lambda **k: pk.rescale(path, 0.5, out, **k),
        "combine": lambda **k: pk.combine({good: 1.0, path: 1.0}, out, **k),
        "diff": lambda **k: pk.diff(good, path, **k),
        "export": lambda **k: pk.export(path, out, "lycoris", **k),
        "doctor": lambda **k: pk.doctor(path, **k),
    }
    try:
        said = verbs[verb]()
    except PeftkitError as error:
        said = error
    if "alpha_zero=" in str(said):
        verbs[verb](alpha_zero="rank")
