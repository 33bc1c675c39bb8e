"""The command line in tests: through the entry point, in a process of its own, and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.hands import loha, lora

#: a name with all that shells and parsers stumble over
ODD = "mein Stil=2 ☃ [bold].safetensors"

#: what the file of that name changes
HANDS = {"lin": lora(12, 8, 4, seed=1), "bare": loha(8, 8, seed=5), "k1": lora(12, 8, 2, seed=9)}


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def entry_point(*arguments: object, **environment: str) -> Ran:
    """A process of its own, as a shell starts it."""
    program = Path(sys.executable).with_name("peftkit")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, env=env, check=False, timeout=240)
    encoding = environment.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    return Ran(done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding))


def require_clear_error(ran: Ran, *words: str) -> None:
    """Code 2, nothing on stdout, one message on stderr, and no traceback."""
    assert ran.code == 2, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert ran.err.startswith("error: ") or "Usage: " in ran.err, ran.err
    assert ran.err.count("error: ") <= 1
    for word in words:
        assert word in ran.err, ran.err
