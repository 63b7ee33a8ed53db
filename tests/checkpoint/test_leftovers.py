"""What killed and failed saves leave: removed by the next save, and never what is being written."""

from __future__ import annotations

import fcntl
import os
import shutil

import orbax.checkpoint as ocp
import pytest
from etils import epath

from flax_tied_lora import checkpoint
from flax_tied_lora._checkpoint import leftovers
from flax_tied_lora._checkpoint.leftovers import DELETED, Leftovers
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.saved_base import base_params, wrapped

DEAD = ("5.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-123", f"{DELETED}/3")


@pytest.fixture
def run(tmp_path):
    """A directory with a step, what dead saves left of others, and a file of somebody else's."""
    folder = tmp_path / "run"
    with checkpoint.Manager(folder) as manager:
        manager.save(1, wrapped())
    for name in DEAD:
        (folder / name / "adapted").mkdir(parents=True)
        (folder / name / "adapted" / "data").write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


LEFT = [DELETED, "1", "5.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-123", "notes.txt"]


def test_opening_removes_them(run):
    assert names(run) == LEFT
    with checkpoint.Manager(run) as manager:
        assert names(run) == ["1", "notes.txt"]
        assert manager.restore(base_params()).step == 1


def test_a_manager_to_restore_only_removes_nothing(run):
    options = ocp.CheckpointManagerOptions(read_only=True)
    with checkpoint.Manager(run, options=options) as manager:
        assert manager.restore(base_params()).step == 1
        assert not manager.save(2, wrapped(), force=True)
    assert names(run) == LEFT


def test_what_another_save_is_writing_stays(run):
    other = Leftovers(epath.Path(run))
    other.begin()
    assert names(run) == ["1", "notes.txt"]
    (run / "2.orbax-checkpoint-tmp").mkdir()
    with checkpoint.Manager(run) as manager:
        assert "2.orbax-checkpoint-tmp" in names(run)
        manager.save(3, wrapped())
        manager.wait_until_finished()
        assert "2.orbax-checkpoint-tmp" in names(run)
        other.end()
        manager.save(4, wrapped())
    assert names(run) == ["1", "3", "4", "notes.txt"]


def test_while_a_step_is_written_others_see_that(tmp_path):
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(1, wrapped())
        assert held(tmp_path)
        manager.wait_until_finished()
        assert not held(tmp_path)


def test_of_two_managers_that_save_one_is_refused(tmp_path):
    """The same run, started twice: which of the two steps would stand there is chance."""
    with checkpoint.Manager(tmp_path) as first, checkpoint.Manager(tmp_path) as second:
        first.save(1, wrapped())
        with pytest.raises(CheckpointError, match=r"another save into it is running \(process \d+"):
            second.save(1, wrapped())
        first.wait_until_finished()
        with pytest.raises(CheckpointError, match=r"step 1 in .* already exists"):
            second.save(1, wrapped())
        assert second.save(2, wrapped())
        second.wait_until_finished()
    assert names(tmp_path) == ["1", "2"]
    with checkpoint.Manager(tmp_path) as manager:
        assert manager.restore(base_params()).step == 2


def held(folder):
    """Whether somebody says that a save lives."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@pytest.mark.parametrize("locks", ["no call", "an error"])
def test_without_locks_only_a_save_removes_them(run, monkeypatch, locks):
    if locks == "no call":
        monkeypatch.setattr(leftovers, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError("Bad file descriptor")

        monkeypatch.setattr(leftovers.fcntl, "flock", refuse)
    with checkpoint.Manager(run) as manager:
        assert names(run) == LEFT
        manager.save(2, wrapped())
    assert names(run) == ["1", "2", "notes.txt"]


def test_what_cannot_be_removed_stays(run, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with checkpoint.Manager(run) as manager:
            assert manager.all_steps() == [1]
    assert names(run) == LEFT


def test_another_process_is_the_one_that_removes(run):
    other = Leftovers(epath.Path(run), mine=False)
    other.look()
    other.begin()
    other.failed("5")
    other.remove_deleted()
    other.end()
    assert names(run) == LEFT


def test_one_checkpoint_leaves_others_alone(run):
    checkpoint.save(run / "5", wrapped())
    assert names(run) == ["1", "5", "7.orbax-checkpoint-tmp-123", "notes.txt"]


def test_in_a_bucket_there_are_no_locks():
    assert not leftovers.is_local(epath.Path("gs://bucket/run"))
    assert leftovers.is_local(epath.Path("/run"))
