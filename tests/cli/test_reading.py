"""Names and scales that the command line says of a file: --rename and --alpha."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import peftkit as pk
from peftkit.cli.process import in_flags
from tests.support.command import Ran, require_clear_error
from tests.support.files import load, require_bits, write

WORDS = ("--rename", "file.q=base.to_q", "--rename", "file.*=base.*", "--alpha", "4")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a file with PEFT's keys of other names."""
    tensors = {
        f"base_model.model.file.{name}.lora_{side}.weight": torch.ones(shape)
        for name in ("q", "mlp")
        for side, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    base = {f"base.{name}.weight": torch.zeros(8, 8) for name in ("to_q", "mlp")}
    return write(tmp_path / "base.safetensors", base), write(tmp_path / "a.safetensors", tensors)


def test_rules_and_a_scale_reach_the_merge(files: tuple[Path, Path], peftkit: Callable[..., Ran]) -> None:
    base, file = files
    words = [word.replace("file.", "base_model.model.file.") for word in WORDS]
    ran = peftkit("merge", base, file, "-o", base.with_name("out.safetensors"), *words)
    assert ran.code == 0, ran.err
    rename = {"base_model.model.file.q": "base.to_q", "base_model.model.file.*": "base.*"}
    pk.merge_checkpoint(base, {file: 1.0}, base.with_name("python.safetensors"), rename=rename, alpha=4)
    require_bits(load(base.with_name("out.safetensors")), load(base.with_name("python.safetensors")))
    assert float(load(base.with_name("out.safetensors"))["base.to_q.weight"][0, 0]) == 4.0


def test_a_plan_says_what_was_renamed(files: tuple[Path, Path], peftkit: Callable[..., Ran]) -> None:
    base, file = files
    words = [word.replace("file.", "base_model.model.file.") for word in WORDS]
    assert "2 names are others than in the file" in peftkit("plan", base, file, *words).out
    renamed = peftkit("plan", base, file, *words, "--json").json["renamed"]
    assert renamed == {str(file): {"base_model.model.file.q": "base.to_q", "base_model.model.file.mlp": "base.mlp"}}
    found = peftkit("inspect", file, *words, "--json").json
    assert {module["name"] for module in found["modules"]} == {"base.to_q", "base.mlp"}


def test_each_message_s_flags_can_be_typed_until_the_file_fits(
    files: tuple[Path, Path], peftkit: Callable[..., Ran]
) -> None:
    base, file = files
    words: list[str] = []
    for _ in range(3):
        ran = peftkit("plan", base, file, *words)
        require_clear_error(ran)
        flags = re.findall(r"--rename '[^']*'|--alpha '[^']*'", ran.err)
        words = [*shlex.split(flags[0]), *words]  # the rule for one name goes before that for its neighbours
    assert peftkit("plan", base, file, *words).code == 0
    assert sorted(words[::2]) == ["--alpha", "--rename", "--rename"]


@pytest.mark.parametrize(
    "words, said",
    [
        (("--rename", "file.q"), "'file.q' was given to --rename, OLD=NEW was expected"),
        (("--rename", "a=b", "--rename", "a=c"), "'a' was given two names"),
        (("--alpha", "half"), "'half' was given, a number was expected"),
        (("--alpha", "-1"), "a positive, finite number"),
    ],
)
def test_what_is_no_rule_and_no_number_is_refused(
    words: tuple[str, ...], said: str, files: tuple[Path, Path], peftkit: Callable[..., Ran]
) -> None:
    require_clear_error(peftkit("inspect", files[1], *words), said)


def test_rules_and_numbers_in_messages_are_flags() -> None:
    assert in_flags("pass rename={'a.*': 'b.*'}") == "pass --rename 'a.*=b.*'"
    assert in_flags("which by alpha=16 or alpha='rank'") == "which by --alpha 16 or --alpha 'rank'"
    assert in_flags("pass alpha=0.5.") == "pass --alpha 0.5."
