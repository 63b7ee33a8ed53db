"""A save that is killed (SIGKILL) at any time: the folder holds a whole save, old or new."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = "tests.helpers.killed_saves"


def campaign(folder: Path, kills: int, how: str, what: str) -> None:
    command = [sys.executable, "-m", PROGRAM, str(folder), str(kills), how, what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert not done.returncode, done.stderr
    result = json.loads(done.stdout)
    assert result["seen"] == {"whole": kills}
    assert result["after"] <= 2 * result["whole"]
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("what", ["adapter", "model"])
@pytest.mark.parametrize("how", ["at once", "one by one"])
def test_twenty_kills(tmp_path, how, what):
    campaign(tmp_path / "saved", 20, how, what)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", "model"])
@pytest.mark.parametrize("how", ["at once", "one by one"])
def test_three_hundred_kills(tmp_path, how, what):
    campaign(tmp_path / "saved", 300, how, what)
