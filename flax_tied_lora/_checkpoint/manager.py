"""`Manager`: the checkpoints of a run."""

from __future__ import annotations

import os
from typing import Any, Self, TypedDict, Unpack

import orbax.checkpoint as ocp

from flax_tied_lora._adapters.adapted import Adapted, Params
from flax_tied_lora._checkpoint.adapters import Restored, adapter_args, restore
from flax_tied_lora._checkpoint.errors import CheckpointError, explained
from flax_tied_lora._checkpoint.record import absolute


class Options(TypedDict, total=False):
    """What `restore` takes by keyword."""

    opt_state: Any
    extra: Any
    sharding: Any
    check_base: bool


class Manager:
    """The checkpoints of a run: a thin wrapper of `orbax.checkpoint.CheckpointManager`.

    Saving is asynchronous: `save` returns once the arrays are copied, so that a training step may
    donate them, and the files are written in the background. A step whose writing was interrupted
    is never taken for a checkpoint.

    Args:
      directory: of the run; made if it does not exist.
      max_to_keep: how many of the latest steps to keep; None for all.
      options: Orbax's options, in place of ``max_to_keep``.

    Example::

      with checkpoint.Manager("run", max_to_keep=3) as manager:
          if manager.latest_step() is not None:
              adapted, state, step, extra = manager.restore(params, opt_state=optimizer)
          ...
          manager.save(step, adapted, opt_state=state)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = None,
        options: ocp.CheckpointManagerOptions | None = None,
    ):
        if options is None:
            keep = ocp.checkpoint_managers.LatestN(max_to_keep)
            options = ocp.CheckpointManagerOptions(preservation_policy=keep)
        elif max_to_keep is not None:
            raise CheckpointError(
                "Manager: max_to_keep is given beside options; set it in the options"
            )
        with explained("Manager: cannot open", directory):
            self.directory = absolute(directory)
            self._orbax = ocp.CheckpointManager(self.directory, options=options)
        self._names = options.step_name_format or ocp.path.step.standard_name_format(
            step_prefix=options.step_prefix,
            step_format_fixed_length=options.step_format_fixed_length,
        )

    def save(
        self,
        step: int,
        adapted: Adapted,
        *,
        opt_state: Any = None,
        extra: Any = None,
        metrics: Any = None,
        force: bool = False,
    ) -> bool:
        """Saves a step, and returns whether it did: Orbax's options say which steps to save.

        Args:
          step: a number above that of the latest step.
          adapted, opt_state, extra: as in `save`.
          metrics: for options that keep the best steps.
          force: whether to save it whatever the options say.

        Raises:
          CheckpointError: the step exists, a leaf cannot be stored, or an earlier save has failed
            in the background.
        """
        latest = self.latest_step()
        if latest is not None and step < latest:
            raise CheckpointError(
                f"save: step {step} is below step {latest}, the latest in {self.directory}; to go "
                "on from an earlier step, use another directory or delete the later steps"
            )
        if not force and not self._orbax.should_save(step):
            return False
        args = adapter_args(adapted, opt_state, step, extra)
        with explained(f"save: step {step} in", self.directory):
            return self._orbax.save(step, args=args, metrics=metrics, force=force)

    def restore(
        self, params: Params, *, step: int | None = None, **kwargs: Unpack[Options]
    ) -> Restored[Params]:
        """Returns the state at a step, by default the latest; other arguments as in `restore`.

        Raises:
          CheckpointError: there is no such step; or as `restore`.
        """
        self.wait_until_finished()
        steps = self.all_steps()
        if not steps:
            raise CheckpointError(f"restore: no checkpoint in {self.directory}; save one first")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(
                f"restore: no step {step} in {self.directory}, which has {steps}; name one of these"
            )
        return restore(self._names.find_step(self.directory, step).path, params, **kwargs)

    def latest_step(self) -> int | None:
        """Returns the number of the latest step, or None where there is none."""
        return self._orbax.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the numbers of all steps, in order."""
        return sorted(self._orbax.all_steps())

    def wait_until_finished(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          CheckpointError: writing has failed.
        """
        with explained("save: writing has failed in", self.directory):
            self._orbax.wait_until_finished()

    def close(self) -> None:
        """Waits until what was saved is on disk, and frees Orbax's threads."""
        with explained("save: writing has failed in", self.directory):
            self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
