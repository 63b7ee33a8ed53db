"""What a `Manager` is opened with: a directory that cannot be one, options that keep the best."""

from __future__ import annotations

import os
import threading

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.saved_base import base_params, wrapped


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    threads = threading.active_count()
    for path in ("file", "file/run"):
        with pytest.raises(CheckpointError, match=r"Manager: .*file is a file; expected a direct"):
            checkpoint.Manager(tmp_path / path)
    assert threading.active_count() == threads
    with pytest.raises(CheckpointError, match=r"save: .*file exists already"):
        checkpoint.save(tmp_path / "file", wrapped())
    with pytest.raises(CheckpointError, match=r"save: cannot write .*file/run: NotADirectoryError"):
        checkpoint.save(tmp_path / "file" / "run", wrapped())


@pytest.mark.parametrize("path", ["run", "new/run"])
def test_a_directory_that_may_not_be_written_to(tmp_path, monkeypatch, path):
    with checkpoint.Manager(tmp_path / "run") as manager:
        manager.save(1, wrapped())
    # Root may write anywhere but to a file system that is read-only, where access says so, too.
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    message = r"Manager: .* cannot be written to; expected .*\(read_only=True\) to restore"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.Manager(tmp_path / path)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with checkpoint.Manager(tmp_path / "run", options=options) as manager:
        assert manager.restore(base_params()).step == 1


def test_a_directory_that_cannot_be_made(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"Manager: cannot open .*run: .*No space left"):
        checkpoint.Manager(tmp_path / "run")


def test_a_directory_that_is_not_to_be_made(tmp_path):
    options = ocp.CheckpointManagerOptions(create=False)
    with pytest.raises(CheckpointError, match=r"run does not exist, and options.create is False"):
        checkpoint.Manager(tmp_path / "run", options=options)
    with checkpoint.Manager(tmp_path, options=options) as manager:
        assert manager.save(1, wrapped())


def test_a_step_whose_directory_cannot_be_made_is_an_error_at_once(tmp_path, monkeypatch):
    with checkpoint.Manager(tmp_path) as manager:
        with monkeypatch.context() as patch:

            def refuse(*_, **__):
                raise OSError(28, "No space left on device")

            patch.setattr(os, "mkdir", refuse)
            with pytest.raises(CheckpointError, match=r"save: step 1 in .*No space left on device"):
                manager.save(1, wrapped())
        assert manager.all_steps() == []
        assert manager.save(1, wrapped())
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_steps_that_the_user_wants_elsewhere(tmp_path):
    options = ocp.CheckpointManagerOptions(max_to_keep=1, todelete_subdir="old")
    with checkpoint.Manager(tmp_path, options=options) as manager:
        for step in range(3):
            manager.save(step, wrapped())
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["0", "1"]


def test_steps_removed_in_the_background(tmp_path):
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_background_delete=True)
    with checkpoint.Manager(tmp_path, options=options) as manager:
        for step in range(3):
            manager.save(step, wrapped())
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


# The best step


def losses(mode="min", **kwargs):
    kwargs = {"best_fn": lambda metrics: metrics["loss"], "best_mode": mode, **kwargs}
    return ocp.CheckpointManagerOptions(**kwargs)


@pytest.mark.parametrize(("mode", "best"), [("min", 3), ("max", 0)])
def test_the_best_step(tmp_path, mode, best):
    with checkpoint.Manager(tmp_path, options=losses(mode, max_to_keep=3)) as manager:
        assert manager.best_step() is None
        for step, loss in enumerate([3.0, 1.0, float("nan"), jnp.float32(1.0), 2.0]):
            manager.save(step, wrapped(), metrics={"loss": loss})
        assert manager.best_step() == best
        assert manager.restore(base_params(), step="best").step == best
        assert manager.restore(base_params()).step == 4
        assert 2 not in manager.all_steps()
    with checkpoint.Manager(tmp_path, options=losses(mode)) as manager:
        assert manager.best_step() == best


def test_no_best_step(tmp_path):
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(1, wrapped(), metrics={"loss": 1.0})
        message = "the options have no best_fn, without which metrics are not kept; pass options="
        with pytest.raises(CheckpointError, match=message):
            manager.best_step()
        with pytest.raises(CheckpointError, match=message):
            manager.restore(base_params(), step="best")
    with checkpoint.Manager(tmp_path, options=losses()) as manager:
        assert manager.best_step() is None
        message = r"no step in .* was saved with metrics, so none is the best of \[1\]; name one"
        with pytest.raises(CheckpointError, match=message):
            manager.restore(base_params(), step="best")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            {"loss": "low"},
            "metrics of step 1 in .*: ValueError: .*'low'; expected numbers that best",
        ),
        (
            {"accuracy": 1.0},
            "metrics of step 1 in .*: KeyError: 'loss'; expected numbers that best_fn",
        ),
        ({"loss": jnp.ones(2)}, "metrics of step 1 in .*: ValueError: .*; expected numbers that"),
    ],
)
def test_metrics_without_a_number(tmp_path, metrics, message):
    with checkpoint.Manager(tmp_path, options=losses(max_to_keep=1)) as manager:
        manager.save(0, wrapped(), metrics={"loss": 2.0})
        with pytest.raises(CheckpointError, match=message):
            manager.save(1, wrapped(), metrics=metrics)
        manager.wait_until_finished()
        assert manager.best_step() == 0
