"""A save that fails or is cut off at any step: the old adapter, the new one or none, no mixture."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from flax_tied_lora._peft.adapter.folder import AdapterFileError
from flax_tied_lora._peft.files import replacement
from tests.helpers import sample_adapter as sample
from tests.helpers.damage import reshard, snapshot
from tests.helpers.sample_adapter import FOREIGN, OTHER_TEXT, TEXT, foreign, found, write


class Steps:
    """Fails at one of the steps that change the directory, and after a crash at all later ones."""

    def __init__(self, patch, error, at, crash):
        self.count, self.error, self.at, self.crash = 0, error, at, crash
        for name in ("replace", "unlink", "rmdir", "mkdir", "fsync", "rename", "link", "open"):
            patch.setattr(os, name, self.counted(name, getattr(os, name)))
        patch.setattr(Path, "open", self.counted("Path.open", Path.open))
        patch.setattr(replacement, "exchange", self.counted("exchange", replacement.exchange))

    def counted(self, name, real):
        def step(*args, **kwargs):
            if name == "open" and not args[1] & os.O_WRONLY:
                return real(*args, **kwargs)
            i = self.count
            self.count += 1
            if i == self.at or (self.crash and i > self.at):
                raise self.error
            return real(*args, **kwargs)

        return step


class Crash(BaseException):
    pass


@pytest.fixture(params=["at once", "one by one"])
def how(request, monkeypatch):
    """Directories that change places in one step; or a system that cannot do that."""
    if request.param == "one by one":
        monkeypatch.setattr(replacement, "exchange", lambda first, second: False)
    return request.param


OUTCOMES = [("one file", None, False), ("to shards", 64, False), ("from shards", None, True)]


def attempts(monkeypatch, prepare, error, crash, **kwargs):
    """Writes with a failure at the first step, at the second one, and so on until none is left."""
    for at in range(1000):
        directory = prepare()
        before = snapshot(directory)
        with monkeypatch.context() as patch:
            steps = Steps(patch, error, at, crash)
            try:
                write(directory, **kwargs)
                failed = None
            except BaseException as caught:
                failed = caught
        yield directory, before, failed
        if steps.count <= at:
            assert failed is None
            assert at > 6
            return


@pytest.fixture
def prepared(tmp_path):
    """Gives a function that makes a new directory with an adapter."""
    made = []

    def prepare(sharded):
        directory = tmp_path / f"adapter {len(made)}"
        made.append(directory)
        sample.save(directory)
        for name, data in FOREIGN.items():
            (directory / name).write_bytes(data)
        if sharded:
            reshard(directory)
        return directory

    return prepare


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Crash()])
@pytest.mark.parametrize("text", [TEXT, OTHER_TEXT], ids=["same config", "other config"])
@pytest.mark.parametrize(("_name", "most", "sharded"), OUTCOMES, ids=[o[0] for o in OUTCOMES])
def test_error_at_any_step(prepared, monkeypatch, how, error, text, _name, most, sharded):
    """The disk is full, or Ctrl-C comes, once: all is as before, or all is new."""
    new = json.loads(text)["lora_alpha"], 1
    results = []
    for directory, before, failed in attempts(
        monkeypatch, lambda: prepared(sharded), error, False, text=text, max_shard_size=most
    ):
        assert isinstance(failed, AdapterFileError | Crash | None)
        if isinstance(failed, AdapterFileError):
            assert "No space left on device" in str(failed)
        if snapshot(directory) != before:
            assert found(directory) == new
            assert foreign(directory) == FOREIGN
            # Past the point of no return there is nothing to tell, unless it was Ctrl-C.
            assert failed is None or isinstance(failed, Crash)
        if isinstance(failed, AdapterFileError):
            assert not list(directory.parent.glob(".*"))
        results.append(snapshot(directory) != before)
    assert results[-1]
    assert results.count(False) > (4 if how == "at once" else 5)


@pytest.mark.parametrize("text", [TEXT, OTHER_TEXT], ids=["same config", "other config"])
@pytest.mark.parametrize(("_name", "most", "sharded"), OUTCOMES, ids=[o[0] for o in OUTCOMES])
def test_crash_at_any_step(prepared, monkeypatch, how, text, _name, most, sharded):
    """The power goes: a reader finds the old adapter or the new one, no mixture and not none."""
    old, new = (16, 0), (json.loads(text)["lora_alpha"], 1)
    results = []
    for directory, _before, failed in attempts(
        monkeypatch, lambda: prepared(sharded), Crash(), True, text=text, max_shard_size=most
    ):
        assert failed is None or isinstance(failed, Crash)
        results.append("old" if (seen := found(directory)) == old else "new")
        assert seen in (old, new)
        assert foreign(directory) == FOREIGN
        # The next save puts all right, and leaves nothing lying.
        write(directory, text=text, max_shard_size=most)
        assert found(directory) == new
        assert not list(directory.parent.glob(".*"))
        assert {n for n in snapshot(directory) if n.startswith(".")} == {".hidden"}
    assert results == sorted(results, key=["old", "new"].index)
    assert set(results) == {"old", "new"}
