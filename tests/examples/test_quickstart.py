"""The quickstart, run as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"


@pytest.mark.usefixtures("standard_promotion")  # Adam of Optax raises a float to an integer
def test_it_prints_the_tie_trains_and_merges(capsys):
    end = runpy.run_path(str(QUICKSTART))
    printed = capsys.readouterr().out

    assert re.search(r"^embed/embedding +- +data flow +64 x 32 +LoRA, rank 4 +384$", printed, re.M)
    assert "trainable: 640 of 3,744 parameters" in printed
    served = re.findall(r"^embed/embedding +(\w+) #0 +(\w+) +low rank ", printed, re.M)
    assert served == [("gather", "lookup"), ("dot_general", "projection")]
    assert "3 call sites, 0 densified" in printed

    losses = [float(x) for x in re.findall(r"^step +\d+: loss (.+)$", printed, re.M)]
    assert len(losses) == 5
    assert losses[-1] < 0.1 * losses[0]

    assert float(end["difference"]) < 1e-5
    assert "merged: the plain model gives the same logits" in printed
    # The adapters moved, both of them, and the base did not.
    merged, params = end["merged"], end["params"]
    assert np.abs(merged["embed"]["embedding"] - params["embed"]["embedding"]).max() > 1e-2
    assert np.abs(merged["dense"]["kernel"] - params["dense"]["kernel"]).max() > 1e-2
    jax.tree.map(np.testing.assert_array_equal, end["adapted"].params, params)
