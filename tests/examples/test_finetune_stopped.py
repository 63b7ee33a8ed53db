"""The demo's program where it is stopped: by options, files, Ctrl-C, a bad loss, a full disk."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import finetune_smollm2
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import smollm2
import training

from tests.helpers.stopped import assert_same, interrupt_at, state_in

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def unloaded(monkeypatch):
    """The weights are not read: what is wrong is found before."""

    def load(file):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(smollm2.GgufFile, "load", load)


def refused(arguments: list[str], capsys) -> str:
    """Returns the line that a program says when it does not begin."""
    try:
        status = finetune_smollm2.main(arguments)
    except SystemExit as end:  # argparse's
        status = end.code
    line = capsys.readouterr().err
    assert status == 2
    assert line.count("\n") == 1
    return line


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


BAD_OPTIONS = [
    (["absent.txt"], "there is no file absent.txt"),
    (["."], r"\. is a folder: name the files in it"),
    (["--model", "absent.gguf"], "there is no file absent.gguf"),
    (["--model", "."], r"\. is a folder: name a file"),
    (["--steps", "0"], "argument --steps: 0 is not above 0: give 1 or more"),
    (["--batch", "0"], "argument --batch: 0 is not above 0"),
    (["--rank", "-4"], "argument --rank: -4 is not above 0"),
    (["--rank", "two"], "argument --rank: invalid positive value: 'two'"),
    (["--last-steps", "-1"], "argument --last-steps: -1 is below 0"),
    (["--learning-rate", "nan"], "argument --learning-rate: nan: give a number above 0"),
    (["--dropout", "1.5"], "argument --dropout: 1.5: give a share"),
    (["--prompt", ""], "argument --prompt: is empty"),
    (["--output", __file__], "is a file: name another folder"),
    (["--output", f"{__file__}/run"], "is a file: name another folder"),
    (["--none"], "unrecognized arguments: --none"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:30])
def test_bad_options(arguments, message, capsys, unloaded):
    assert re.search(message, refused(arguments, capsys))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: name a file with text"),
        (b" \n", "is empty"),
        (b"caf\xe9", "byte 3 is not UTF-8 text: convert the file first"),
        (b"\x7fELF\0\0", "holds a zero byte, as no text does"),
        (b"short", "tokens make no row of 32"),
        (b"The text. " * 60, "held-out tokens make no batch: raise --held-out|tokens make no row"),
    ],
)
def test_bad_texts(options, tmp_path, capsys, unloaded, data, message):
    (tmp_path / "text.txt").write_bytes(data)
    arguments = [str(tmp_path / "text.txt"), *options(tmp_path / "run")[1:]]
    assert re.search(message, refused(arguments, capsys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "embeding"}, "nearby: 'model/embed_tokens'"),
        ({"rank": 1000}, "rank"),
        ({"batch": 20}, "held-out tokens make no batch: raise --held-out"),
        ({"held_out": 0}, "held_out is 0"),
        ({"length": 97}, "--length takes 97 tokens, and the model 96: lower it"),
        ({"prompt": "The" * 40}, "--prompt with --new-tokens takes 128 tokens, and the model 96"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model(options, tmp_path, capsys, unloaded, changes, message):
    assert re.search(message, refused(options(tmp_path / "run", **changes), capsys))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none(files, tmp_path, capsys):
    (tmp_path / "cut.gguf").write_bytes(Path(files[2]).read_bytes()[:5000])
    (tmp_path / "text.gguf").write_text("hello " * 9)
    for name in ("cut", "text"):
        arguments = [files[0], "--model", str(tmp_path / f"{name}.gguf"), "--output", str(tmp_path)]
        assert "is no whole GGUF file" in refused(arguments, capsys)


def test_a_folder_that_may_not_be_written_to(options, tmp_path, capsys, unloaded, monkeypatch):
    # Root may write anywhere but to a file system that is read-only, where access says so, too.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "may not be written to: name another folder" in refused(options(tmp_path), capsys)


def test_checkpoints_of_another_run(options, whole, tmp_path, capsys, unloaded):
    before = content(whole)
    message = refused(options(whole, rank=4), capsys)
    assert re.search(r"--rank 8, and now --rank 4.*--fresh.*--output", message)
    (tmp_path / "text.txt").write_text("Another text. " * 400)
    message = refused([str(tmp_path / "text.txt"), *options(whole)[1:]], capsys)
    assert re.search(r"a text of checksum \d+, and now a text of checksum \d+", message)
    assert content(whole) == before
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    message = refused(options(tmp_path / "run"), capsys)
    assert "holds checkpoints of another program" in message
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").write_text("a file")
    assert "checkpoints is a file" in refused(options(tmp_path / "run"), capsys)


def test_only_train_needs_a_checkpoint(options, tmp_path, capsys):
    line = refused([*options(tmp_path), "--only-train"], capsys)
    assert "there is no checkpoint in" in line


def test_ctrl_c_then_the_same_command(options, whole, tmp_path, monkeypatch, capsys):
    usual = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert finetune_smollm2.main(options(tmp_path)) == 130
    assert signal.getsignal(signal.SIGINT) is usual
    printed = capsys.readouterr().out
    assert "After training" not in printed
    assert "Stopped, and saved step 3." in printed
    command = re.search(r"Interrupted. To go on:\n  (.+)$", printed, re.M)[1]
    assert "finetune_smollm2.py" in command
    assert f"--output {tmp_path}" in command
    assert state_in(options(tmp_path)).step == 3  # the step in hand was finished

    assert finetune_smollm2.main(options(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "Going on from step 3" in printed
    assert "What is adapted" not in printed
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))


def test_ctrl_c_at_the_last_step_is_heard(options, whole, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 5)
    assert finetune_smollm2.main(options(tmp_path)) == 130
    assert "After training" not in capsys.readouterr().out
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))


# The program, which says when it saves, and takes its time.
SLOW_TO_SAVE = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import finetune_smollm2, program, training
real = training.Job.save
def save(*args):
    real(*args)
    print("saving", flush=True)
    time.sleep(600)
training.Job.save = save
program.leave(finetune_smollm2.main())
"""


def test_a_second_ctrl_c_ends_at_once_and_the_last_save_stays(
    options, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert finetune_smollm2.main(options(tmp_path)) == 130
    words = [sys.executable, "-c", SLOW_TO_SAVE, str(EXAMPLES), *options(tmp_path, save_every=5)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            for line in ("Compiling the training step.\n", "saving\n"):
                assert line in iter(child.stdout.readline, "")
                child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=20)
        finally:
            child.kill()
    assert child.returncode == 130
    assert "Stopping after this step, and saving. Ctrl-C again ends at once." in errors
    assert re.search(r"Ended at once. To go on from the last save:\n  .*--output", errors)
    assert "Traceback" not in errors
    assert state_in(options(tmp_path)).step in (3, 4)
    assert finetune_smollm2.main(options(tmp_path)) == 0
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))


def test_ctrl_c_reaches_the_new_process(tmp_path, monkeypatch, capfd, caplog):
    other = tmp_path / "other.py"
    other.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(finetune_smollm2, "__file__", str(other))
    assert finetune_smollm2.in_new_process([]) == 130


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_none_stops_and_keeps_the_last_good_step(
    options, tmp_path, monkeypatch, capsys, bad
):
    real = training.Job.take_step

    def take_step(job, state, rows):
        real(job, state, rows)
        if state.step == 4:
            state.losses[-1] = float(bad)

    monkeypatch.setattr(training.Job, "take_step", take_step)
    assert finetune_smollm2.main(options(tmp_path)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"step 4: the loss is {bad}.* Step 2, .* is kept in .*checkpoints\.", last)
    assert "--learning-rate" in last
    monkeypatch.undo()
    state = state_in(options(tmp_path))
    assert state.step == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.adapted.adapters))


def test_adapters_whose_loss_is_none_are_not_saved(options, tmp_path, monkeypatch, capsys):
    """The step's own loss was that of the adapters before it."""
    real = training.Job.take_step

    def take_step(job, state, rows):
        real(job, state, rows)
        if state.step == 4:
            broken = jax.tree.map(lambda x: x * np.nan, state.adapted.adapters)
            state.adapted = state.adapted.replace(adapters=broken)

    monkeypatch.setattr(training.Job, "take_step", take_step)
    assert finetune_smollm2.main(options(tmp_path)) == 1
    assert "step 4: the loss is nan" in capsys.readouterr().err
    monkeypatch.undo()
    assert state_in(options(tmp_path)).step == 2


def test_a_full_disk_is_said_last(options, tmp_path, monkeypatch, capfd, caplog):
    real = ocp.StandardCheckpointHandler.finalize

    def finalize(handler, directory):
        if "4.orbax" in str(directory):
            raise OSError(28, "No space left on device")
        real(handler, directory)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", finalize)
    assert finetune_smollm2.main(options(tmp_path)) == 1
    errors = capfd.readouterr().err
    assert "Traceback" not in errors + caplog.text
    last = errors.splitlines()[-1]
    assert re.search(r"writing has failed .*No space left on device.*Step 2, .* is kept in", last)
    monkeypatch.undo()
    assert finetune_smollm2.main(options(tmp_path)) == 0
