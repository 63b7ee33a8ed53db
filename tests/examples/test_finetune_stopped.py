"""The fine-tuning program where it is stopped: by Ctrl-C, a bad loss, a full disk."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import finetune
import jax
import metrics
import numpy as np
import orbax.checkpoint as ocp
import pytest
from job import Job

from flax_tied_lora import peft
from tests.helpers.stopped import assert_same, content, interrupt_at, state_in

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_ctrl_c_then_the_same_command(options, whole, tmp_path, monkeypatch, capsys):
    usual = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert finetune.main(options(tmp_path)) == 130
    assert signal.getsignal(signal.SIGINT) is usual
    printed = capsys.readouterr().out
    assert "After training" not in printed
    assert "Stopped, and saved step 3." in printed
    command = re.search(r"Interrupted. To go on:\n  (.+)$", printed, re.M)[1]
    assert "finetune.py" in command
    assert f"--output {tmp_path}" in command
    assert state_in(options(tmp_path)).step == 3  # the step in hand was finished

    assert finetune.main(options(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "Going on from step 3" in printed
    assert "What is adapted" not in printed
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))
    assert content(tmp_path / "adapter") == content(whole / "adapter")
    assert content(tmp_path / "merged") == content(whole / "merged")


def test_ctrl_c_at_the_last_step_is_heard(options, whole, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 5)
    assert finetune.main(options(tmp_path)) == 130
    assert "After training" not in capsys.readouterr().out
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))


# The program, which says when it saves, and takes its time.
SLOW_TO_SAVE = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import finetune, job, program
real = job.Job.save
def save(*args):
    real(*args)
    print("saving", flush=True)
    time.sleep(600)
job.Job.save = save
program.leave(finetune.main())
"""


def test_a_second_ctrl_c_ends_at_once_and_the_last_save_stays(
    options, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert finetune.main(options(tmp_path)) == 130
    words = [sys.executable, "-c", SLOW_TO_SAVE, str(EXAMPLES), *options(tmp_path, save_every=5)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            for line in ("Compiling the training step.\n", "saving\n"):
                assert line in iter(child.stdout.readline, "")
                child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=100)
        finally:
            child.kill()
    assert child.returncode == 130
    assert "Stopping after this step, and saving. Ctrl-C again ends at once." in errors
    assert re.search(r"Ended at once. To go on from the last save:\n  .*--output", errors)
    assert "Traceback" not in errors
    assert state_in(options(tmp_path)).step in (3, 4)
    assert finetune.main(options(tmp_path)) == 0
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))


def test_ctrl_c_reaches_the_new_process(tmp_path, monkeypatch, capfd, caplog):
    other = tmp_path / "other.py"
    other.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(finetune, "__file__", str(other))
    assert finetune.in_new_process([]) == 130


def test_a_killed_run_comes_to_the_same_end(options, whole, tmp_path, monkeypatch):
    """It dies with the best adapter and metrics of a later step than its checkpoint's."""
    real = Job.take_step

    def take_step(job, state, numbers):
        if state.step == 5:
            raise KeyboardInterrupt
        real(job, state, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "take_step", take_step)
        assert finetune.main(options(tmp_path, save_every=3)) == 130
    assert state_in(options(tmp_path)).step == 3
    assert '"step": 5' in (tmp_path / "metrics.jsonl").read_text()
    assert finetune.main(options(tmp_path, save_every=3)) == 0
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))
    assert content(tmp_path / "adapter") == content(whole / "adapter")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_none_stops_and_keeps_the_last_good_step(
    options, tmp_path, monkeypatch, capsys, bad
):
    real = Job.take_step

    def take_step(job, state, numbers):
        real(job, state, numbers)
        if state.step == 4:
            state.losses[-1] = float(bad)

    monkeypatch.setattr(Job, "take_step", take_step)
    assert finetune.main(options(tmp_path)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"step 4: the loss is {bad}.* Step 2, .* is kept in .*checkpoints\.", last)
    assert f"The best adapter so far is kept in {tmp_path / 'adapter'}." in last
    assert "--learning-rate" in last
    monkeypatch.undo()
    state = state_in(options(tmp_path))
    assert state.step == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.adapted.adapters))
    best = Job(finetune.options(options(tmp_path))).best()
    jax.tree.map(np.testing.assert_array_equal, best.adapters, state.adapted.adapters)


def test_adapters_whose_loss_is_none_are_not_saved(options, tmp_path, monkeypatch, capsys):
    """The step's own loss was that of the adapters before it."""
    real = Job.take_step

    def take_step(job, state, numbers):
        real(job, state, numbers)
        if state.step == 4:
            broken = jax.tree.map(lambda x: x * np.nan, state.adapted.adapters)
            state.adapted = state.adapted.replace(adapters=broken)

    monkeypatch.setattr(Job, "take_step", take_step)
    assert finetune.main(options(tmp_path)) == 1
    assert "step 4: the loss is nan" in capsys.readouterr().err
    monkeypatch.undo()
    assert state_in(options(tmp_path)).step == 2


@pytest.mark.parametrize("name", ["adapter", "metrics", "merged"])
def test_no_space_for_what_a_run_leaves(options, whole, tmp_path, monkeypatch, capsys, name):
    """It is said once, and the same command goes on when there is space again."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / name))

    with monkeypatch.context() as patch:
        if name == "adapter":
            patch.setattr(peft, "save_adapter", full)
        elif name == "merged":
            patch.setattr(peft, "save_merged", full)
        else:
            patch.setattr(metrics.Metrics, "write", full)
        assert finetune.main(options(tmp_path)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"No space left on device.*the same command goes on$", last)
    assert finetune.main(options(tmp_path)) == 0
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))


def test_a_full_disk_is_said_last(options, tmp_path, monkeypatch, capfd, caplog):
    real = ocp.StandardCheckpointHandler.finalize

    def finalize(handler, directory):
        if "4.orbax" in str(directory):
            raise OSError(28, "No space left on device")
        real(handler, directory)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", finalize)
    assert finetune.main(options(tmp_path)) == 1
    errors = capfd.readouterr().err
    assert "Traceback" not in errors + caplog.text
    last = errors.splitlines()[-1]
    assert re.search(r"writing has failed .*No space left on device.*Step 2, .* is kept in", last)
    monkeypatch.undo()
    assert finetune.main(options(tmp_path)) == 0
