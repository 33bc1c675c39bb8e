"""What every verb owes on every file: it is read right or refused by name, within bounds, and nothing is left."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.support import corpus
from tests.support.corpus import Files, Place, Verb, outcome, pair

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


def tuned_base(at: Place) -> Path:
    tuned = at.folder / "tuned.safetensors"
    if not tuned.exists():
        model = pair()
        with torch.no_grad():
            model.a.weight.add_(1)
        tuned.write_bytes(corpus.model_file(model))
    return tuned
