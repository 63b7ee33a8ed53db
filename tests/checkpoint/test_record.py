"""One save under a name at a time: of two that come together, one is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers import processes
from tests.helpers.concurrent_saves import campaign
from tests.helpers.saved_base import base_params, wrapped

HOLDER = """
import sys, time
from pathlib import Path
from flax_tied_lora._checkpoint.record import _one_save, absolute
with _one_save(absolute(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_save_is_refused_and_says_whose_is_running(tmp_path):
    """And the lock of a process that died is taken over."""
    path = tmp_path / "new" / "adapter"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True,
        env=processes.environment(1),
    ) as child:  # fmt: skip
        try:
            assert child.stdout.readline() == "held\n"
            message = (
                rf"adapter: another save into it is running \(process {child.pid} on \S+, for \d+ "
                r"s\); expected one at a time; wait for it to end, or save to another directory"
            )
            with pytest.raises(CheckpointError, match=message):
                checkpoint.save(path, wrapped())
            with pytest.raises(CheckpointError, match=message):
                checkpoint.save_params(path, base_params())
            checkpoint.save(path.with_name("other"), wrapped())
        finally:
            child.send_signal(signal.SIGKILL)
    assert sorted(os.listdir(path.parent)) == [".adapter.lock", "other"]
    checkpoint.save(path, wrapped(), step=3)
    assert sorted(os.listdir(path.parent)) == ["adapter", "other"]
    assert checkpoint.restore(path, base_params()).step == 3


def test_concurrent_savers_and_readers(tmp_path):
    """Readers see whole checkpoints only, and of each name one save returns, whose it is."""
    campaign(tmp_path / "saved", 2, 1, "checkpoint", "processes")


@pytest.mark.slow
@pytest.mark.parametrize("savers", [2, 4, 8])
def test_concurrent_savers_and_readers_for_half_a_minute(tmp_path, savers):
    campaign(tmp_path / "saved", savers, 30, "checkpoint", "processes")
