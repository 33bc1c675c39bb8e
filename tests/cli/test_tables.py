"""Tables at 80 columns: no word is cut, and modules that are alike are one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import Ran
from tests.support.files import write
from tests.support.hands import full, lora, lycoris_tensors

LONG = "down_blocks_0_attentions_0_transformer_blocks_{}_attn1_to_out_0_of_a_model_whose_names_are_long"


@pytest.fixture
def long_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of twelve modules, eleven of them alike, and the base of it."""
    hands = {LONG.format(i): lora(12, 8, 4, seed=i) for i in range(11)} | {"last": lora(6, 8, 2)}
    write(tmp_path / "style.safetensors", lycoris_tensors(hands))
    weights = {f"{name}.weight": full(12 if name != "last" else 6, 8, seed=1).tensors["diff"] for name in hands}
    write(tmp_path / "base.safetensors", weights)
    return tmp_path


COMMANDS = {
    "inspect": ("inspect", "{file}"),
    "plan": ("plan", "{base}", "{file}"),
    "merge --dry-run": ("merge", "{base}", "{file}", "-o", "{out}", "--dry-run"),
    "merge": ("merge", "{base}", "{file}", "-o", "{out}"),
    "export": ("export", "{file}", "-t", "lycoris", "-o", "{out}"),
    "convert": ("convert", "{file}", "-k", "full", "-o", "{out}"),
    "resize": ("resize", "{file}", "--rank", "1", "-o", "{out}"),
}


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_is_cut_and_like_modules_are_one_line(
    command: str, every: bool, long_names: Path, peftkit: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    at = {"{file}": "style.safetensors", "{base}": "base.safetensors", "{out}": "out.safetensors"}
    monkeypatch.chdir(long_names)
    ran = peftkit(*(at.get(word, word) for word in COMMANDS[command]), *(["--all"] if every else []))
    assert ran.code == 0, ran.err
    table = re.split(r"^(?:\w+\.safetensors(?: for \w+)?:|merged into)", ran.out, flags=re.MULTILINE)[0]
    joined = "".join(line.strip() for line in table.splitlines())
    assert all(len(line) <= 80 for line in table.splitlines())
    assert not any(line.rstrip().endswith("…") and not line.rstrip().endswith(", …") for line in table.splitlines())
    shown = [name for name in (LONG.format(i) for i in range(11)) if name in joined]
    if command == "merge" and not every:
        assert shown == []
    else:
        assert len(shown) == (11 if every else 1)
        assert every or {"11", "12"} & set(table.split())  # export does not tell shapes apart
