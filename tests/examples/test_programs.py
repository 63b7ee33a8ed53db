"""All examples as programs: ``--help``, Ctrl-C; and what they share for that."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import finetune
import finetune_on_a_mesh
import program
import pytest
import runs

from tests.helpers import processes

EXAMPLES = Path(__file__).parents[2] / "examples"
# What has a program's last lines.
PROGRAMS = sorted(f.stem for f in EXAMPLES.glob("*.py") if "__main__" in f.read_text())


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]


def test_there_are_four():
    assert PROGRAMS == ["finetune", "finetune_on_a_mesh", "quickstart", "serve_many"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_comes_before_heavy_imports(name):
    words = command(name, "--help")
    words.insert(1, "-Ximporttime")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {name}.py")
    assert not re.search(r"\| +(jax|flax|optax|transformers)$", done.stderr, re.M)


@pytest.mark.parametrize("module", [finetune, finetune_on_a_mesh], ids=lambda m: m.__name__)
def test_help_describes_every_option(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for action in module.parser()._actions:
        assert action.help
        assert all(name in printed for name in action.option_strings)


def interrupted(words: list[str], at: str) -> str:
    """Sends a program a real Ctrl-C when it prints a line with a text; returns all output."""
    with subprocess.Popen(
        [words[0], "-u", *words[1:]], text=True, env=processes.environment(1),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as child:  # fmt: skip
        try:
            assert any(at in line for line in iter(child.stdout.readline, ""))
            child.send_signal(signal.SIGINT)
            printed, _ = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130, printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize(("name", "line"), [("quickstart", "step   0"), ("serve_many", "trained")])
def test_ctrl_c_in_what_keeps_nothing(name, line):
    assert "nothing is kept: the same command begins anew" in interrupted(command(name), line)


@pytest.mark.parametrize("name", PROGRAMS)
def test_ctrl_c_while_it_imports(name, tmp_path, files):
    words = command(name)
    if name.startswith("finetune"):
        words += ["--output", str(tmp_path / "run"), *(files if name == "finetune" else [])]
    words.insert(1, "-Ximporttime")
    printed = interrupted(words, " jax._src.config")
    if name.startswith("finetune"):
        assert f"{name}.py --output {tmp_path / 'run'}" in printed
    else:
        assert "nothing is kept" in printed
    assert not (tmp_path / "run").exists()


def test_a_run_folder_without_checkpoints_is_free(tmp_path):
    def folder(**settings):
        return runs.RunFolder(tmp_path / "run", tmp_path / "run" / "steps", settings, "go away")

    folder(rank=1).check()
    assert not (tmp_path / "run").exists()
    folder(rank=1).begin()
    folder(rank=2).check()
    folder(rank=2).begin()
    (tmp_path / "run" / "steps" / "10").mkdir(parents=True)
    folder(rank=2).begin()
    folder(rank=2).check()
    for other in ({"rank": 1}, {}, {"rank": 2, "alpha": 3}):
        with pytest.raises(program.RefusedError, match=r"made with --(rank|alpha) .*go away"):
            folder(**other).check()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["run.json", "steps"]
    (tmp_path / "run" / "run.json").write_text("[")
    with pytest.raises(program.RefusedError, match="checkpoints of another program"):
        folder(rank=2).check()
    assert runs.kept(tmp_path / "run" / "steps").startswith("Step 10, the last one saved, is")
    folder(rank=2).remove()
    folder(rank=3).check()


def test_results_of_another_program_are_left_alone(tmp_path):
    def folder(**settings):
        steps = tmp_path / "steps"
        return runs.RunFolder(tmp_path, steps, settings, "go away", ["adapter", "metrics"])

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("precious")
    with pytest.raises(program.RefusedError, match="another program, or its results"):
        folder(rank=1).check()
    folder(rank=1).remove()
    assert (tmp_path / "adapter" / "weights").read_text() == "precious"
    folder(rank=1).begin()  # a run's own, from here on
    (tmp_path / "metrics").write_text("a line")
    folder(rank=1).check()
    with pytest.raises(program.RefusedError, match="--rank 1, and now --rank 2"):
        folder(rank=2).check()
    folder(rank=2).remove()
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    folder(rank=2).check()


def test_what_is_kept(tmp_path):
    assert runs.kept(tmp_path / "steps") == "No step was saved."
    (tmp_path / "adapter").mkdir()
    text = runs.kept(tmp_path / "steps", tmp_path / "adapter")
    assert text == f"No step was saved. The best adapter so far is kept in {tmp_path / 'adapter'}."


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (program.RefusedError("two\nlines"), 2, ": two lines\n"),
        (program.FailedError("a loss"), 1, ": a loss\n"),
        (OSError(28, "No space left on device"), 1, "No space left on device\n"),
    ],
)
def test_a_program_ends_with_one_line(capsys, raised, status, printed):
    def body():
        raise raised

    assert program.run(body, "again") == status
    found = capsys.readouterr()
    assert found.err.endswith(printed)
    assert found.err.count("\n") == 1
    assert not found.out


def test_a_bug_keeps_its_traceback():
    def body():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        program.run(body, "again")


@pytest.mark.parametrize("raises", [True, False])
def test_ctrl_c_says_how_to_go_on(capsys, raises):
    def body():
        if raises:
            raise KeyboardInterrupt
        return program.INTERRUPTED

    assert program.run(body, "the command") == 130
    assert capsys.readouterr().out == "\nInterrupted. To go on:\n  the command\n"


def test_the_command_can_be_given_to_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.py").write_text("import sys; print(sys.argv[1:])")
    words = ["--prompt", "Once upon; a 'time'"]
    text = program.command("echo.py", words)
    assert os.sep + "echo.py" not in text
    assert subprocess.check_output(text, shell=True, text=True) == f"{words}\n"
