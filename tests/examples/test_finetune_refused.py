"""The fine-tuning program where it does not begin: options, texts, models, folders."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import finetune
import loading
import pytest

from tests.helpers import small_llama
from tests.helpers.stopped import content


@pytest.fixture
def unloaded(monkeypatch):
    """The weights are not read: what is wrong is found before."""

    def load(*args):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loading, "load", load)


def refused(arguments: list[str], capsys) -> str:
    """Returns the line that a program says when it does not begin."""
    try:
        status = finetune.main(arguments)
    except SystemExit as end:  # argparse's
        status = end.code
    line = capsys.readouterr().err
    assert status == 2
    assert line.count("\n") == 1
    return line


BAD_OPTIONS = [
    (["absent.txt"], "there is no file absent.txt"),
    (["."], r"\. is a folder: name the files in it"),
    (["--model", "absent.gguf"], r"there is no file or folder absent\.gguf"),
    (["--format", "chat"], "--format chat needs files: name JSON lines of messages"),
    (["--format", "json"], "argument --format: invalid choice: 'json'"),
    (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
    (["--patience", "-1"], "argument --patience: -1 is below 0"),
    (["--accumulate", "0"], "argument --accumulate: 0 is not above 0"),
    (["--evaluate-every", "0"], "argument --evaluate-every: 0 is not above 0"),
    (["--log", "csv"], "argument --log: invalid choice: 'csv'"),
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
        (b"short", "of 5 leaves nothing to train on or to hold out"),
        (b"The text. " * 60, "held out: .* tokens make no row"),
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
        ({"batch": 300}, "rows make no batch of 300: give more text or a smaller batch"),
        ({"batch": 20, "accumulate": 15}, "rows make no batch of 300"),
        ({"held_out": 0}, "held_out is 0"),
        ({"length": 97}, "--length takes 97 tokens, and the model 96: lower it"),
        ({"prompt": "The" * 50}, r"--prompt with --new-tokens takes 104 tokens, and the model 96"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model(options, tmp_path, capsys, unloaded, changes, message):
    assert re.search(message, refused(options(tmp_path / "run", **changes), capsys))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_none(files, tmp_path, capsys, unloaded):
    def refusal(model: Path) -> str:
        arguments = [files[0], "--model", str(model), "--output", str(tmp_path / "run")]
        return refused(arguments, capsys)

    (tmp_path / "text.gguf").write_text("hello " * 9)
    assert "text.gguf is no whole GGUF file" in refusal(tmp_path / "text.gguf")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(tmp_path / "empty")
    other = small_llama.write(tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "mamba"}')
    assert "'mamba'" in refusal(other)
    (other / "config.json").write_text("{")
    assert "config.json" in refusal(other)
    assert not (tmp_path / "run").exists()


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
