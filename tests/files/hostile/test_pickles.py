"""Pickles are read as data or refused: none runs code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftkit as pk
from peftkit.errors import FileError
from tests.support import corpus
from tests.support.bounds import put, require_law
from tests.support.corpus import ADAPTER_VERBS, BASE_VERBS, CONFIG, LORA, PICKLE_VERBS, Place, ones


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
