"""Small files that claim to be large take little memory and time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support import corpus
from tests.support.bounds import SECONDS
from tests.support.paths import ROOT

# of a group: one worker measures, and not each for itself
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("bombs")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[corpus.Measured]:
    """Every bomb, in a process that may use little more than it has."""
    folder = tmp_path_factory.mktemp("bombs")
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.corpus", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    shutil.rmtree(folder)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [corpus.Measured(**one) for one in json.loads(ran.stdout)]


@pytest.mark.parametrize("bomb", corpus.bombs())
def test_a_small_file_that_claims_to_be_large_takes_little_memory_and_time(
    bomb: str, measured: list[corpus.Measured]
) -> None:
    for one in measured:
        if one.bomb == bomb:
            assert one.wrong is None, f"{one.verb}: {one.wrong}"
            assert one.seconds < SECONDS + one.size / 10e6, f"{one.verb}: {one.seconds:.1f} s for {one.size} bytes"
            allowed = 200e6 + 20 * one.size
            assert one.grown < allowed, f"{one.verb}: {one.grown / 1e6:.0f} MB for {one.size} bytes"
