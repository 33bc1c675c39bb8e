"""Checkpoints and adapters under the names of every family, damaged: each is read right, or refused by name."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftkit as pk
from peftkit.errors import PeftkitError
from peftkit.files.families.module import NUMBER
from peftkit.files.families.names import FAMILIES
from tests.files.hostile.test_mutations import fuzz
from tests.support.classes import rows_of

#: numbers of blocks that no family has, or that are none
NUMBERS = ("0", "1", "00", "-1", "999", str(10**30), "", "x", NUMBER, "0.0")
SIZES = ((), (0,), (1,), (3,), (0, 1), (1, 0), (5, 1), (6, 2), (7, 1, 1), (6, 1, 3, 3))


def checkpoint(family: str) -> dict[str, Tensor]:
    """The first block of everything in the denoiser, with weights as small as the family leaves them."""
    tensors: dict[str, Tensor] = {}
    for spec in FAMILIES[family].parts[0].specs:
        key, rows = spec.original.replace(NUMBER, "0"), rows_of(spec)
        before = tensors.get(key, torch.empty(0)).shape[0]
        tensors[key] = torch.ones(before + rows, 1)
    return tensors


SMALL = sorted(name for name, family in FAMILIES.items() if not any(spec.shape for spec in family.parts[0].specs))


@st.composite
def damaged(draw: st.DrawFn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With one to four tensors left out, doubled under another number, or of another size or dtype."""
    tensors = dict(tensors)
    for _ in range(min(draw(st.integers(1, 4)), len(tensors) - 1)):
        key = draw(st.sampled_from(sorted(tensors)))
        how = draw(st.sampled_from(("size", "size", "number", "remove", "dtype", "name")))
        if how == "size":
            tensors[key] = torch.ones(draw(st.sampled_from(SIZES)))
        elif how == "number":
            tensors[key.replace(".0.", f".{draw(st.sampled_from(NUMBERS))}.").replace("_0_", "_1_")] = tensors[
                key
            ].clone()
        elif how == "dtype":
            tensors[key] = tensors[key].to(draw(st.sampled_from((torch.int64, torch.bool, torch.float8_e4m3fn))))
        elif how == "name":
            other = draw(st.sampled_from((f"{key}.weight", key.upper(), key.replace(".", "_"), f"net.{key}")))
            tensors[other] = tensors[key].clone()
        else:
            del tensors[key]
    return tensors


@st.composite
def adapter(draw: st.DrawFn, family: str) -> dict[str, Tensor]:
    """A LoRA of some modules, in a spelling, which may be damaged."""
    known = FAMILIES[family]
    style = draw(st.sampled_from(("kohya", "diffusers", "ldm", "lycoris", "peft")))
    tensors: dict[str, Tensor] = {}
    for spec in draw(st.lists(st.sampled_from(known.parts[0].specs), min_size=1, max_size=4, unique_by=id)):
        name = known.spelled(spec.numbered("0").name, style)
        rows = sum(map(rows_of, known.find(name)))
        tensors |= {f"{name}.lora_up.weight": torch.ones(rows, 2), f"{name}.lora_down.weight": torch.ones(2, 1)}
    return draw(damaged(tensors)) if draw(st.booleans()) else tensors


@fuzz(60)
@given(st.data())
def test_a_damaged_checkpoint_of_a_family_is_merged_right_or_refused(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(SMALL))
    weights = checkpoint(family)
    weights = data.draw(damaged(weights)) if data.draw(st.booleans()) else weights
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(weights, folder / "base.safetensors")
        save_file(data.draw(adapter(family)), folder / "adapter.safetensors")
        before = {path: path.read_bytes() for path in folder.iterdir()}
        for verb in (
            lambda: pk.inspect(folder / "adapter.safetensors"),
            lambda: pk.plan_merge(folder / "base.safetensors", {folder / "adapter.safetensors": 1.0}),
            lambda: pk.merge_checkpoint(
                folder / "base.safetensors", {folder / "adapter.safetensors": 1.0}, folder / "out.safetensors"
            ),
        ):
            _refused(verb)
        if (folder / "out.safetensors").exists():
            merged = load_file(folder / "out.safetensors")
            assert {key: (t.shape, t.dtype) for key, t in merged.items()} == {
                key: (t.shape, t.dtype) for key, t in weights.items()
            }
            (folder / "out.safetensors").unlink()
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


@fuzz(150)
@given(st.data())
def test_a_damaged_adapter_of_a_family_is_exported_right_or_refused(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(SMALL))
    target = data.draw(st.sampled_from(("a1111", "forge", "comfyui", "kohya", "lycoris", "diffusers", "peft")))
    said = data.draw(st.sampled_from(({}, {"family": family}, {"alpha": "rank"})))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, out = folder / "adapter.safetensors", folder / ("out" if target == "peft" else "out.safetensors")
        save_file(data.draw(adapter(family)), source)
        before = source.read_bytes()
        failed = _refused(lambda: pk.export(source, out, target, **said))
        assert out.exists() is not failed
        assert source.read_bytes() == before and len(list(folder.iterdir())) == 2 - failed


def _refused(verb: Any) -> bool:
    """Whether it raises a typed error; any other is none of a file's doing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is left out
        try:
            verb()
        except PeftkitError:
            return True
    return False
