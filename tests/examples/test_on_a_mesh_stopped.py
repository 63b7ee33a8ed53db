"""The training script on a mesh where it is stopped: by options, Ctrl-C, a bad loss."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import finetune_on_a_mesh
import numpy as np
import orbax.checkpoint as ocp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from tests.helpers import processes
from tests.helpers.stopped import interrupt_at

PROGRAM = Path(finetune_on_a_mesh.__file__)
SMALL = ["--width", "16", "--layers", "1", "--length", "16", "--rank", "2", "--save-every", "2"]
ON_EIGHT = [*SMALL, "--mesh", "data=8", "--steps", "6"]


def main(*arguments: object) -> int:
    try:
        return finetune_on_a_mesh.main([*ON_EIGHT, *map(str, arguments)])
    except SystemExit as end:  # argparse's
        return int(end.code or 0)


def steps(folder: Path) -> list[int]:
    with checkpoint.Manager(folder) as manager:
        return manager.all_steps()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "-2"], "argument --rank: -2 is not above 0: give 1 or more"),
        (["--batch", "0"], "argument --batch: 0 is not above 0"),
        (["--learning-rate", "inf"], "argument --learning-rate: inf: give a number above 0"),
        (["--output", __file__], "is a file: name another folder"),
        (["--base", "absent"], "there is no folder absent: check the path"),
        (["--base", "."], "is no checkpoint of flax_tied_lora"),
        (["--width", "18"], "--width 18: give a multiple of 4"),
        (["--vocabulary", "200"], "--vocabulary 200: the text's bytes need 256 or more"),
        (["--rank", "17"], "rank"),
        (["--batch", "1000000"], "make no batch of 1000000: give more text or a smaller batch"),
        (["--coordinator", "localhost:1"], "--processes and --process go together"),
        (["--process", "0"], "--processes and --process go together"),
        (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
            "--process 2 is none of --processes 2: the last is 1",
        ),
    ],
)
def test_bad_options(arguments, message, capsys):
    assert main(*arguments) == 2
    assert re.search(message, (line := capsys.readouterr().err))
    assert line.count("\n") == 1


def test_ctrl_c_then_the_same_command(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert main("--output", tmp_path) == 130
    printed = capsys.readouterr()
    assert "stopped; step 3 is saved" in printed.out
    command = re.search(r"Interrupted. To go on:\n  (.+)$", printed.out, re.M)[1]
    assert f"finetune_on_a_mesh.py {' '.join(ON_EIGHT)} --output {tmp_path}" in command
    assert steps(tmp_path) == [2, 3]
    assert main("--output", tmp_path) == 0
    assert "going on from step 3" in capsys.readouterr().out
    assert steps(tmp_path) == [4, 6]

    assert main("--output", tmp_path, "--rank", 4) == 2
    assert re.search(r"--rank 2, and now --rank 4.*--output", capsys.readouterr().err)


def test_ctrl_c_without_a_folder(monkeypatch, capsys):
    interrupt_at(monkeypatch, 1)
    assert main() == 130
    assert "step 2 is not saved: there is no --output" in capsys.readouterr().out


def test_a_loss_that_is_none(tmp_path, monkeypatch, capsys):
    real = tied_lora.train.step

    def step(*args):
        taken, inner = [], real(*args)

        def take(*args):
            *new, loss = inner(*args)
            taken.append(loss)
            return *new, loss * np.nan if len(taken) == 4 else loss

        return take

    monkeypatch.setattr(tied_lora.train, "step", step)
    assert main("--output", tmp_path) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"step 4: the loss is nan.* Step 2, the last one saved, is kept in", last)
    assert steps(tmp_path) == [2]


def test_adapters_whose_loss_is_none_are_not_saved(tmp_path, capsys):
    """A learning rate at which the first step's loss is a number, and no later one."""
    assert main("--output", tmp_path, "--learning-rate", "1e30", "--save-every", 1) == 1
    assert re.search(r"step 1: the loss is (nan|inf).* No step was saved", capsys.readouterr().err)
    assert not steps(tmp_path)


def test_a_full_disk_is_said_last(tmp_path, monkeypatch, capfd, caplog):
    def finalize(handler, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", finalize)
    assert main("--output", tmp_path) == 1
    errors = capfd.readouterr().err
    assert re.search(r"writing has failed in .*No space left on device", errors.splitlines()[-1])
    assert "Traceback" not in errors + caplog.text


def test_all_processes_stop_after_the_same_step(tmp_path):
    """Ctrl-C reaches one of two."""
    where = ["--coordinator", f"localhost:{processes.free_port()}", "--processes", "2"]
    arguments = [*SMALL, "--mesh", "data=2", "--steps", "100000", "--output", str(tmp_path), *where]
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments, "--process", str(i)], text=True,
            env=processes.environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        first, second = started
        assert first.stdout is not None
        assert any(line.startswith("step 3:") for line in iter(first.stdout.readline, ""))
        second.send_signal(signal.SIGINT)
        ends = [process.communicate(timeout=120) for process in (first, second)]
    finally:
        for process in started:
            processes.end(process)
    assert [process.returncode for process in started] == [130, 130], ends
    assert not any("Traceback" in errors for _, errors in ends)
    (stopped,) = re.findall(r"stopped; step (\d+) is saved", ends[0][0])
    assert steps(tmp_path)[-1] == int(stopped)
