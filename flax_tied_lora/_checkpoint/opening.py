"""What a `Manager` is opened with: its directory, checked, and Orbax's options, completed."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from flax_tied_lora._checkpoint.errors import CheckpointError
from flax_tied_lora._checkpoint.leftovers import DELETED


def check_directory(path: epath.Path, options: ocp.CheckpointManagerOptions) -> None:
    """Checks the local directory of a run, before Orbax finds out in the background.

    Raises:
      CheckpointError: it is a file or below one, does not exist and is not to be made, or may not
        be written to.
    """
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise CheckpointError(
            f"Manager: {nearest} is a file; expected a directory, or nothing, at {path}; name "
            "another directory"
        )
    if options.read_only:
        return
    if nearest != path and not options.create:
        raise CheckpointError(
            f"Manager: {path} does not exist, and options.create is False; make it, or name "
            "another directory"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"Manager: {nearest} cannot be written to; expected a directory that this user may "
            "write to, on a file system that is not read-only. Name another directory, or pass "
            "options=orbax.checkpoint.CheckpointManagerOptions(read_only=True) to restore only"
        )


def completed_options(
    max_to_keep: int | None, options: ocp.CheckpointManagerOptions | None, local: bool
) -> ocp.CheckpointManagerOptions:
    """Returns the options that a `Manager` works with.

    A step that is to go is renamed before it is removed. Directories are made before `save`
    returns: where that fails in the background, Orbax waits for five minutes. A metric that is NaN
    is the worst.

    Raises:
      CheckpointError: ``max_to_keep`` is given beside options.
    """
    if options is None:
        keep = ocp.checkpoint_managers.LatestN(max_to_keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=keep)
    elif max_to_keep is not None:
        raise CheckpointError("Manager: max_to_keep is given beside options; set it in the options")
    changes: dict[str, Any] = {}
    if options.async_options is None:
        changes["async_options"] = ocp.AsyncOptions(create_directories_asynchronously=False)
    elsewhere = options.todelete_subdir or options.todelete_full_path
    if local and not options.read_only and not elsewhere:
        changes["todelete_subdir"] = DELETED
    if options.best_fn is not None:
        changes["best_fn"] = _without_nan(options.best_fn, options.best_mode)
    return dataclasses.replace(options, **changes)


def _without_nan(best_fn: Any, mode: str) -> Any:
    worst = -math.inf if mode == "max" else math.inf

    def best(metrics: Any) -> float:
        value = float(best_fn(metrics))
        return worst if math.isnan(value) else value

    return best
