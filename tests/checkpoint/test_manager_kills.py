"""Runs that are killed (SIGKILL) at any time: what is listed restores, and nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def campaign(folder: Path, kills: int) -> None:
    command = [sys.executable, "-m", "tests.helpers.killed_runs", str(folder), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == kills
    for after in found:
        assert after, f"a run has ended by itself: {done.stderr}"
        assert not after["wrong"]
        assert not after["lost"]
        assert not after["left"]
        assert after["times"] <= 2
    # Kills come in the middle of something.
    assert sum(bool(after["removed"]) for after in found) > kills / 3


def test_twenty_kills(tmp_path):
    campaign(tmp_path / "run", 20)


@pytest.mark.slow
def test_three_hundred_kills(tmp_path):
    campaign(tmp_path / "run", 300)
