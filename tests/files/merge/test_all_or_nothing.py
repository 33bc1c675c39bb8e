"""A merge is written whole or not at all: errors, killed processes, full disks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftkit as pk
from peftkit.errors import FileError
from tests.support.files import listing, load, load_folder, same_bits, sharded, write
from tests.support.hands import full, lycoris_tensors
from tests.support.merging import prepared
from tests.support.models import net, state
from tests.support.processes import run_python


def test_the_base_may_be_overwritten_by_the_result(tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    pk.merge_checkpoint(base, {file: 0.7}, tmp_path / "out.safetensors")
    before = sorted(listing(tmp_path))
    pk.merge_checkpoint(base, {file: 0.7}, base, verify=True, overwrite=True)
    assert base.read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert sorted(listing(tmp_path)) == before


def test_the_same_merge_gives_the_same_bytes(tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    for name in ("1.safetensors", "2.safetensors"):
        pk.merge_checkpoint(base, {file: 0.7}, tmp_path / name)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_folder_is_never_written_over_another(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", state(net()), 6)
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    before = listing(tmp_path)
    with pytest.raises(FileError, match="one of the inputs"):
        pk.merge_checkpoint(folder, {file: 1.0}, folder)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_an_error_in_the_middle_leaves_what_was_there(layout: str, tmp_path: Path) -> None:
    """Whatever it is: an interrupt, a full disk, a caller's own exception."""
    base, file = prepared(tmp_path)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there before")
    if layout == "folder":
        base, out = sharded(tmp_path / "model", load(base), 3), tmp_path / "out"
    before = listing(tmp_path)
    for moment in range(7):
        for error in (KeyboardInterrupt, OSError(28, "No space left on device"), ZeroDivisionError):

            def stop(done: int, total: int, at: list[int] = [moment], error: Any = error) -> None:  # noqa: B006
                at[0] -= 1
                if at[0] < 0:
                    raise error

            with pytest.raises(FileError if isinstance(error, OSError) else error):
                pk.merge_checkpoint(base, {file: 1.0}, out, progress=stop, verify=True)
            assert listing(tmp_path) == before


def test_progress_counts_the_bytes_of_the_base(tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    seen: list[tuple[int, int]] = []
    pk.merge_checkpoint(
        base, {file: 1.0}, tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total))
    )
    total = sum(t.nbytes for t in load(base).values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total) and {t for _, t in seen} == {total}


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("key", ["layer1.weight", "big.weight"], ids=["changed", "copied"])
def test_verify_notices_a_byte_that_the_disk_changed(key: str, layout: str, tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    tensors = load(base)
    out = tmp_path / "out.safetensors"
    if layout == "folder":
        base, out = sharded(tmp_path / "model", tensors, 3), tmp_path / "out"
    before = listing(tmp_path)

    def damaging() -> Callable[[int, int], None]:
        done: list[Path] = []

        def damage(*_: int) -> None:
            """Turn one bit of the tensor round, once, as soon as it is on the disk."""
            for path in (p for p in tmp_path.rglob("*") if ".tmp" in str(p) and p.is_file() and not done):
                with path.open("r+b") as opened:
                    length = int.from_bytes(opened.read(8), "little")
                    entry = json.loads(opened.read(length).decode()).get(key) if length else None
                    if entry is None:
                        continue
                    at = 8 + length + entry["data_offsets"][0] + 5
                    opened.seek(at)
                    byte = opened.read(1)
                    if byte:
                        done.append(path)
                        opened.seek(at)
                        opened.write(bytes([byte[0] ^ 1]))

        return damage

    with pytest.raises(FileError, match=key.replace(".", r"\.")):
        pk.merge_checkpoint(base, {file: 1.0}, out, progress=damaging(), verify=True)
    assert listing(tmp_path) == before
    pk.merge_checkpoint(base, {file: 1.0}, out, progress=damaging())
    damaged = load(out) if layout == "file" else load_folder(out)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    pk.merge_checkpoint(base, {file: 1.0}, out, verify=True)
    sound = load(out) if layout == "file" else load_folder(out)
    assert [k for k in sound if not same_bits(sound[k], damaged[k])] == [key], "the damage was not done"


KILL = """
import json, os, resource, signal, sys
import torch, peftkit as pk
from pathlib import Path
base, adapter, folder = map(Path, sys.argv[1:])
torch.set_num_threads(1)
pk.merge_checkpoint
old, results = b"what was there before", {}

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def attempt(name, prepare, out, **options):
    if out.name.startswith("old"):
        out.write_bytes(old)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            prepare()
            pk.merge_checkpoint(base, {adapter: 1.0}, out, **options)
            os._exit(0)
        except pk_error:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    ended = "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    left = [p.name for p in folder.iterdir() if p.name not in (base.name, adapter.name, out.name)]
    content = "nothing" if not out.exists() else "old" if out.read_bytes() == old else "new"
    results[name] = [ended, content, len(left)]
    for name in left:
        (folder / name).unlink()
    out.unlink(missing_ok=True)

from peftkit.errors import FileError as pk_error
from peftkit.files.formats import disk
for out in (folder / "old.safetensors", folder / "new.safetensors"):
    for moment in range(7):
        def progress(done, total, left=[moment]):
            left[0] -= 1
            left[0] < 0 and die()
        attempt(f"{out.stem} at tensor {moment}", lambda: None, out, progress=progress)
    for call in ("fsync", "replace"):
        def prepare(call=call):
            class Os:
                def __getattr__(self, name):
                    return die if name == call else getattr(os, name)
            disk.os = Os()
        attempt(f"{out.stem} before {call}", prepare, out, verify=True)
    for size in (100, 50_000, 1_000_000):
        def limit(size=size):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        attempt(f"{out.stem} on a disk of {size}", limit, out)
    attempt(f"{out.stem} undisturbed", lambda: None, out)
print(json.dumps(results))
"""


@pytest.mark.processes
def test_a_killed_process_or_a_full_disk_leaves_the_old_file_or_none(tmp_path: Path) -> None:
    """SIGKILL at every tensor, before the flush and before the rename; a disk that ends in header, tensor or copy."""
    base, file = prepared(tmp_path)
    results = run_python(KILL, base, file, tmp_path)
    for name, (ended, content, left) in results.items():
        was = "old" if name.startswith("old") else "nothing"
        if "undisturbed" in name:
            assert (ended, content, left) == (0, "new", 0), name
        elif "disk" in name:
            assert (ended, content, left) == (3, was, 0), name
        else:
            assert (ended, content) == ("killed", was), name
