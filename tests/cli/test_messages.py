"""What is said about what was probably not meant."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import peftkit as pk
from peftkit.cli import bench, monitor, options
from peftkit.cli.process import in_flags
from peftkit.errors import FileError
from peftkit.files.formats import peft_config
from tests.support.command import ODD, Ran, require_clear_error


def test_a_strength_of_zero_is_warned_of(folder: Path, peftkit: Callable[..., Ran]) -> None:
    ran = peftkit("plan", folder / "base.safetensors", f"{folder / ODD}=0")
    assert ran.code == 0 and "a strength of 0 changes nothing" in ran.err


def test_a_strength_apart_from_its_file_is_told_where_it_belongs(folder: Path, peftkit: Callable[..., Ran]) -> None:
    ran = peftkit("plan", folder / "base.safetensors", folder / "other.safetensors", "0.8")
    require_clear_error(ran, f"as {folder / 'other.safetensors'}=0.8")


def test_a_typing_error_is_answered_with_the_file_that_is_there(folder: Path, peftkit: Callable[..., Ran]) -> None:
    require_clear_error(peftkit("inspect", folder / "othr.safetensors"), "Did you mean 'other.safetensors'")


def test_a_checkpoint_is_no_adapter(folder: Path, peftkit: Callable[..., Ran]) -> None:
    require_clear_error(peftkit("inspect", folder / "base.safetensors"), "looks like a checkpoint")


def test_a_pattern_that_matches_nothing_is_named(folder: Path, peftkit: Callable[..., Ran]) -> None:
    ran = peftkit("plan", folder / "base.safetensors", f"{folder / ODD}=lycoris_li=0.5")
    require_clear_error(ran, "'lycoris_li' has matched nothing")


def test_strengths_by_pattern_are_typed_alike_in_merge_and_rescale(folder: Path, peftkit: Callable[..., Ran]) -> None:
    by = "lycoris_k*=2,*=0.5"
    planned = peftkit("plan", folder / "base.safetensors", f"{folder / ODD}={by}", "--json").json
    assert {p["name"]: p["strength"] for p in planned["patches"]} == {
        "lycoris_lin": 0.5,
        "lycoris_bare": 0.5,
        "lycoris_k1": 2.0,
    }
    (folder / "rules.json").write_text(json.dumps({"lycoris_k*": 2, "*": 0.5}))
    outs = [folder / f"{i}.safetensors" for i in range(3)]
    for out, typed in zip(outs, ((by,), tuple(by.split(",")), (folder / "rules.json",)), strict=True):
        assert peftkit("rescale", folder / ODD, *typed, "-o", out).code == 0
    assert len({out.read_bytes() for out in outs}) == 1


def test_resizing_that_does_nothing_says_so(folder: Path, peftkit: Callable[..., Ran]) -> None:
    pk.resize(folder / "other.safetensors", folder / "small.safetensors", rank=2)
    ran = peftkit("resize", folder / "small.safetensors", "--rank", 4, "-o", folder / "out.safetensors")
    assert ran.code == 0 and "no module got fewer ranks" in ran.err


def test_what_a_narrow_dtype_loses_is_warned_of(folder: Path, peftkit: Callable[..., Ran]) -> None:
    words = ("merge", folder / "base.safetensors", f"{folder / ODD}=0.002", "-o", folder / "out.safetensors")
    assert "--dtype fp32" in peftkit(*words, "--dtype", "bf16").err


def test_numpy_numbers_are_strengths(folder: Path) -> None:
    for number in (np.float32(0.5), np.float64(0.5), np.int64(2)):
        assert pk.plan_merge(folder / "base.safetensors", {folder / ODD: number}).patches[0].strength == float(number)


def test_a_misspelt_key_of_the_scale_is_refused_by_name(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    path = tmp_path / "adapter_config.json"
    for key, meant in (("alpha_patern", "alpha_pattern"), ("lora_alhpa", "lora_alpha"), ("use_rs_lora", "use_rslora")):
        path.write_text(json.dumps({**config, key: {}}))
        with pytest.raises(FileError, match=f"{key!r} is no option of PEFT.*{meant!r}"):
            peft_config.read_config(path)


def test_no_key_of_peft_is_taken_for_a_misspelt_one(tmp_path: Path) -> None:
    library = pytest.importorskip("peft")
    for kind in ("LoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig", "IA3Config"):
        own = {field.name: None for field in dataclasses.fields(getattr(library, kind))}
        (tmp_path / "config.json").write_text(json.dumps({**own, "peft_type": "LORA"}))
        assert set(peft_config.read_config(tmp_path / "config.json")) >= set(own)


def test_values_of_options_are_the_library_s() -> None:
    from peftkit.bench import cases, ops, peers
    from peftkit.files import combine, kinds
    from peftkit.files.export import programs
    from peftkit.monitor import fluctuation

    assert tuple(kinds.KINDS) == options.KINDS and tuple(combine.METHODS) == options.METHODS
    assert tuple(programs.TARGETS) == options.TARGETS and monitor.MODES == fluctuation.MODES
    assert tuple(peers.KINDS) == bench.KINDS and tuple(cases.MODELS) == bench.MODELS
    assert bench.OPERATIONS == ops.OPERATIONS


def test_messages_speak_of_flags() -> None:
    """No message of the files' verbs has an option of the command line in Python's words when it gets there."""
    flags = ("ignore", "allow_pickle", "other_base", "origin", "dora_axis", "alpha_zero", "overwrite")
    found = 0
    for path in Path(pk.__path__[0], "files").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                for flag in flags:
                    found += f"{flag}=" in node.value
                    assert f"{flag}=" not in in_flags(node.value), node.value
    assert found >= len(flags)
