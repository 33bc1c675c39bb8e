"""The command as a process: what it imports, how it ends, and what is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import ODD, Ran, entry_point
from tests.support.files import listing

PROGRAM = Path(sys.executable).with_name("peftkit")


@pytest.mark.parametrize("words", [("--help",), ("-h",), ("--version",), ("merge", "-h"), ("bench", "step", "--help")])
def test_help_and_version_do_without_torch(words: tuple[str, ...]) -> None:
    code = f"import sys; sys.argv = ['peftkit', *{words!r}]\nimport atexit\n" + (
        "atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\nfrom peftkit.cli import run\nrun()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == "False" and done.stdout


def test_the_package_is_a_program_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peftkit", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("peftkit ")


def test_shells_are_taught_to_complete_commands_and_values() -> None:
    assert "peftkit" in entry_point("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").out
    words = {"_PEFTKIT_COMPLETE": "complete_bash", "COMP_WORDS": "peftkit export x --target com", "COMP_CWORD": "4"}
    assert entry_point(**words).out.split() == ["comfyui"]


_SLOW = """
import sys, time
from peftkit.files.formats import container
real = container.put
def put(file, data):
    real(file, data)
    print("writing", flush=True)
    time.sleep(60)
container.put = put
from peftkit.cli import run
run()
"""


def started(*words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that hears signals, as one of a terminal does; one of the background inherits that it ignores them."""

    def hear() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=hear)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_half_written(number: signal.Signals, code: int, folder: Path) -> None:
    before = listing(folder)
    words = ["merge", folder / "base.safetensors", f"{folder / ODD}=1", "-o", folder / "out.safetensors"]
    with started(sys.executable, "-c", _SLOW, *map(str, words)) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert listing(folder) == before


def test_an_interrupt_while_torch_is_imported_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with started(str(PROGRAM), "inspect", "x", env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        time.sleep(0.1)  # into the sleep of the import
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


@pytest.mark.parametrize(
    "words", [("inspect", "none.safetensors", "--json"), ("inspect", "--json"), ("merg", "--json")]
)
def test_errors_are_json_where_json_is_asked_for(words: tuple[str, ...], peftkit: Callable[..., Ran]) -> None:
    ran = peftkit(*words)
    assert ran.code == 2 and ran.err == ""
    found = json.loads(ran.out)
    assert set(found) == {"error", "type"} and found["error"]
    assert found["type"] == ("FileError" if "none" in words[1] else "UsageError")
