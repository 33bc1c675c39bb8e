"""Names in a file do not reach the terminal as commands."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from peftkit import cli
from tests.support.corpus import LORA, Place, ones, safetensors

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
