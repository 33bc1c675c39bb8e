"""A file that is replaced or written to while a verb reads it is refused, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import peftkit as pk
from peftkit.errors import FileError
from peftkit.files.formats import container

KEYS = ("first", "second", "third")


def base_tensors(value: float) -> dict[str, Tensor]:
    return {f"{key}.weight": torch.full((12, 8), value) for key in KEYS}


def write_base(path: Path, value: float) -> Path:
    save_file(base_tensors(value), path)
    return path


def write_adapter(path: Path, value: float) -> Path:
    tensors = {f"{key}.lora_up.weight": torch.full((12, 2), value) for key in KEYS}
    tensors |= {f"{key}.lora_down.weight": torch.ones(2, 8) for key in KEYS}
    tensors |= {f"{key}.alpha": torch.tensor(2.0) for key in KEYS}
    save_file(tensors, path)
    return path


def write_folder(folder: Path, value: float) -> Path:
    """Two shards, an index and a configuration."""
    folder.mkdir()
    tensors = base_tensors(value)
    where = {key: f"{i // 2}.safetensors" for i, key in enumerate(tensors)}
    for file in set(where.values()):
        save_file({key: tensor for key, tensor in tensors.items() if where[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"value": value}))
    return folder


def rename_over(other: Path, target: Path) -> None:
    os.replace(other, target)


def write_over(other: Path, target: Path) -> None:
    """The same file with other bytes, as many, and the time it had."""
    before = target.stat()
    target.write_bytes(other.read_bytes())
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


REPLACEMENTS = {"renamed over": rename_over, "written over": write_over}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("what", ["base", "adapter"])
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_a_merge_of_a_file_that_is_replaced_meanwhile_is_refused(
    how: str, what: str, verify: bool, tmp_path: Path
) -> None:
    files = {"base": write_base(tmp_path / "base.safetensors", 1.0)}
    files["adapter"] = write_adapter(tmp_path / "adapter.safetensors", 1.0)
    other = {"base": write_base, "adapter": write_adapter}[what](tmp_path / "other.safetensors", 5.0)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there")

    def replace(done: int, total: int) -> None:
        if other.exists():
            REPLACEMENTS[how](other, files[what])
            other.unlink(missing_ok=True)

    with pytest.raises(FileError, match=rf"{what}.safetensors was replaced, written to or cut off"):
        pk.merge_checkpoint(files["base"], {files["adapter"]: 1.0}, out, verify=verify, progress=replace)
    assert out.read_bytes() == b"what was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "base.safetensors", "out.safetensors"]


@pytest.mark.parametrize("file", ["0.safetensors", "1.safetensors", "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_a_merge_of_a_folder_of_which_one_file_is_replaced_is_refused(how: str, file: str, tmp_path: Path) -> None:
    base, other = write_folder(tmp_path / "base", 1.0), write_folder(tmp_path / "other", 5.0)
    adapter = write_adapter(tmp_path / "adapter.safetensors", 1.0)

    def replace(done: int, total: int) -> None:
        if (other / file).exists():
            REPLACEMENTS[how](other / file, base / file)
            (other / file).unlink(missing_ok=True)

    with pytest.raises(FileError, match=file):
        pk.merge_checkpoint(base, {adapter: 1.0}, tmp_path / "out", progress=replace, verify=True)
    assert not (tmp_path / "out").exists()


def test_a_file_that_appears_in_the_folder_meanwhile_is_not_copied(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", 1.0)
    adapter = write_adapter(tmp_path / "adapter.safetensors", 1.0)
    pk.merge_checkpoint(
        base, {adapter: 1.0}, tmp_path / "out", progress=lambda done, total: (base / "late.txt").write_text("")
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in base.iterdir() if p.name != "late.txt"
    )


def test_a_base_that_is_replaced_while_it_is_extracted_from_is_refused(tmp_path: Path) -> None:
    base, tuned = write_base(tmp_path / "base.safetensors", 1.0), write_base(tmp_path / "tuned.safetensors", 2.0)
    other = write_base(tmp_path / "other.safetensors", 5.0)

    def replace(done: int, total: int) -> None:
        if other.exists():
            os.replace(other, base)

    with pytest.raises(FileError, match=r"base.safetensors was replaced"):
        pk.extract(tuned, base, tmp_path / "out.safetensors", rank=1, progress=replace)
    assert not (tmp_path / "out.safetensors").exists()


def peft_folder(folder: Path, alpha: float, value: float) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": "first"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.first.lora_"
    tensors = {f"{prefix}A.weight": torch.ones(2, 8), f"{prefix}B.weight": torch.full((12, 2), value)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_configuration_and_weights_of_two_moments_are_not_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is replaced between the reading of its configuration and of its weights."""
    ours, other = peft_folder(tmp_path / "ours", 2.0, 1.0), peft_folder(tmp_path / "other", 4.0, 5.0)
    read: Callable[..., object] = container.read

    def late(path: Path) -> object:
        if other.exists():
            for file in other.iterdir():
                os.replace(file, ours / file.name)
            shutil.rmtree(other)
        return read(path)

    monkeypatch.setattr(container, "read", late)
    with pytest.raises(FileError, match=r"adapter_config.json was replaced"):
        pk.read(ours)
    assert pk.read(ours).patches["first"].options["alpha"] == 4.0


def test_a_file_that_is_read_again_unchanged_is_the_same(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter.safetensors", 1.0)
    found = pk.read(adapter)
    assert [len(dict(found.patches)) for _ in range(2)] == [3, 3]
