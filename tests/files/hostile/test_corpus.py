"""Whatever bytes a file holds, it is read right or refused by name: no other error, no hang, no code, nothing left."""

from __future__ import annotations

import shutil

import pytest

from tests.support import corpus
from tests.support.bounds import put, require_law, tuned_base
from tests.support.corpus import ADAPTER_VERBS, BASE_VERBS, GOOD, Place


def test_a_sound_file_passes_through_every_verb(at: Place) -> None:
    """The law below is not kept by refusing all."""
    path = at.folder / "other.safetensors"
    path.write_bytes(GOOD)
    for verb in ADAPTER_VERBS.values():
        at.prepare()
        shutil.rmtree(at.out_folder, ignore_errors=True)
        verb(path, at)
    tuned = tuned_base(at)
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
