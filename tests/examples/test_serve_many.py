"""The serving example, run as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

SERVE_MANY = Path(__file__).parents[2] / "examples" / "serve_many.py"


@pytest.mark.usefixtures("standard_promotion")  # Adam of Optax raises a float to an integer
def test_every_example_is_continued_by_its_own_adapter(capsys):
    end = runpy.run_path(str(SERVE_MANY))
    printed = capsys.readouterr().out

    counted = re.findall(r"^from (\d+) in steps of (\d+): (.+)$", printed, re.M)
    assert [int(step) for _, step, _ in counted] == [8, 7, 6, 5, 4, 3, 2, 1]
    for start, step, numbers in counted:
        expected = (int(start) + int(step) * np.arange(1, 8)) % end["VOCABULARY"]
        assert numbers.split() == [str(x) for x in expected]
    assert "the step was traced 1 time(s)" in printed
    assert "give the same tokens: 56 of 56" in printed

    # Slots 0 to 3 count before the others are there, and 4 to 7 do not.
    before, rows = end["before"], np.arange(8)[:, None]
    counts = (rows + (rows + 1) * np.arange(1, 8)) % end["VOCABULARY"] == before
    assert counts[:4].all()
    assert not counts[4:].all(axis=1).any()
