"""One save into a directory at a time; what a dead one leaves is taken over."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from flax_tied_lora._peft.adapter.folder import AdapterFileError, write_adapter
from flax_tied_lora._peft.files import replacement
from flax_tied_lora._tree import lock
from tests.helpers import sample_adapter as sample
from tests.helpers.concurrent_saves import campaign
from tests.helpers.sample_adapter import OTHER_TEXT, TEXT, found, sources, tensors, write


@pytest.fixture
def adapter(tmp_path):
    sample.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_second_save_is_refused_and_says_whose_is_running(adapter):
    """It comes while the first one writes its tensors: as a test says when, with no race."""
    messages = []

    def get(array):
        with pytest.raises(AdapterFileError) as caught:
            write(adapter, OTHER_TEXT, seed=0)
        messages.append(str(caught.value))
        return array

    (name, shape, dtype, _), *others = sources(tensors(1))
    array = tensors(1)[name]
    first = (name, shape, dtype, lambda: get(array))
    write_adapter(adapter, TEXT, [first, *others], overwrite=True)
    assert found(adapter) == (16, 1)
    (message,) = messages
    assert re.search(
        rf"adapter: another save into it is running \(process {os.getpid()} on \S+, for \d+ s\); "
        "expected one at a time; wait for it to end, or save to another directory",
        message,
    )
    assert not list(adapter.parent.glob(".*"))


def test_saves_to_other_directories_do_not_wait(adapter, tmp_path):
    with replacement.replacement(adapter):
        write(tmp_path / "other")
    assert found(tmp_path / "other") == (16, 1)
    assert found(adapter) == (16, 0)


HOLDER = """
import sys, time
from pathlib import Path
from flax_tied_lora._peft.files.replacement import replacement
with replacement(Path(sys.argv[1])) as new:
    new.write("adapter_model.safetensors", [b"half"])
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_process_that_died_is_taken_over(adapter):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(adapter)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(AdapterFileError, match=rf"is running \(process {child.pid} on"):
        write(adapter, OTHER_TEXT)
    assert found(adapter) == (16, 0)  # readers are not kept out
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(list(adapter.parent.glob(".*"))) == 2  # its lock, and what it had written
    assert found(adapter) == (16, 0)
    write(adapter, OTHER_TEXT)
    assert found(adapter) == (99, 1)
    assert not list(adapter.parent.glob(".*"))


def test_reader_settles_what_a_dead_save_had_noted(adapter, monkeypatch):
    """Where directories cannot be exchanged: the config is gone, the note says what is to be."""
    monkeypatch.setattr(replacement, "exchange", lambda first, second: False)
    real, calls = os.replace, []

    class Killed(BaseException):
        pass

    def step(a, b):
        calls.append(1)
        if len(calls) > 2:  # the note has its name, the old config is away
            raise Killed
        return real(a, b)

    def stop(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", step)
        patch.setattr(replacement.shutil, "rmtree", stop)
        patch.setattr(replacement.Path, "unlink", stop)
        with pytest.raises(Killed):
            write(adapter, OTHER_TEXT)
    assert not (adapter / "adapter_config.json").exists()
    assert found(adapter) == (99, 1)
    assert not list(adapter.parent.glob(".*.saving"))


def test_a_directory_that_cannot_be_written_is_read_as_it_is(adapter, monkeypatch):
    staging = adapter.parent / ".adapter.saving"
    staging.mkdir()
    monkeypatch.setattr(lock.os, "open", lambda *a, real=os.open, **k: _refused(a) or real(*a, **k))
    assert found(adapter) == (16, 0)
    assert staging.exists()


def _refused(args):
    if str(args[0]).endswith(".lock"):
        raise PermissionError(13, "Permission denied")


def test_other_files_stay_the_same_files(adapter):
    (adapter / "notes.txt").write_text("mine")
    inode = (adapter / "notes.txt").stat().st_ino
    write(adapter, OTHER_TEXT)
    assert (adapter / "notes.txt").read_text() == "mine"
    assert (adapter / "notes.txt").stat().st_ino == inode


def test_folders_in_the_directory_stay(adapter):
    (adapter / "runs").mkdir()
    (adapter / "runs" / "log").write_text("mine")
    write(adapter, OTHER_TEXT)
    assert found(adapter) == (99, 1)
    assert (adapter / "runs" / "log").read_text() == "mine"
    assert not list(adapter.parent.glob(".*"))


def test_a_directory_that_is_a_link_stays_one(adapter, tmp_path):
    (tmp_path / "latest").symlink_to(adapter)
    write(tmp_path / "latest", OTHER_TEXT)
    assert (tmp_path / "latest").is_symlink()
    assert found(adapter) == (99, 1)


@pytest.mark.parametrize(("savers", "how"), [(2, "processes"), (4, "threads"), (8, "threads")])
def test_concurrent_savers_and_readers(tmp_path, savers, how):
    """Readers see whole adapters only, and saves that return are whole."""
    campaign(tmp_path / "saved", savers, 1, "adapter", how)


@pytest.mark.slow
@pytest.mark.parametrize("savers", [2, 4, 8])
def test_concurrent_savers_and_readers_for_half_a_minute(tmp_path, savers):
    campaign(tmp_path / "saved", savers, 30, "adapter", "processes")


@pytest.mark.parametrize(
    "note",
    ['{"new": ["../../other"], "old": []}', '{"new": [], "old": ["a/b"]}', "[]", "{", '{"new": 1}'],
)
def test_a_note_from_a_stranger_moves_nothing(adapter, note):
    """A folder that was downloaded may hold anything: names of files only are carried out."""
    staging = adapter / ".adapter.saving"
    staging.mkdir()
    (staging / ".moves.json").write_text(note)
    (adapter.parent / "other").write_text("mine")
    assert found(adapter) == (16, 0)
    assert (adapter.parent / "other").read_text() == "mine"
    with pytest.raises(AdapterFileError, match=r"\.moves\.json: .*expected"):
        write(adapter, OTHER_TEXT)
    assert found(adapter) == (16, 0)
