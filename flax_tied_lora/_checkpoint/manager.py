"""`Manager`: the checkpoints of a run."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any, Literal, Self, TypedDict, Unpack

import jax
import orbax.checkpoint as ocp
from etils import epath

from flax_tied_lora._adapters.adapted import Adapted, Params
from flax_tied_lora._checkpoint.adapters import Restored, adapter_args, restore, step_number
from flax_tied_lora._checkpoint.errors import CheckpointError, explained
from flax_tied_lora._checkpoint.leftovers import Leftovers, is_local
from flax_tied_lora._checkpoint.opening import check_directory, completed_options
from flax_tied_lora._checkpoint.record import absolute, read_record


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
    is never taken for a checkpoint, and what was written of it is removed: at once where writing
    fails, by the next save or `Manager` where the process was killed.

    Args:
      directory: of the run; made if it does not exist.
      max_to_keep: how many of the latest steps to keep; None for all.
      options: Orbax's options, in place of ``max_to_keep``.

    Raises:
      CheckpointError: the directory is a file, cannot be made, or may not be written to. Options
        with ``read_only=True`` are for restoring only.

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
        with explained("Manager: cannot open", directory):
            self.directory = absolute(directory)
            local = is_local(self.directory)
            self._options = completed_options(max_to_keep, options, local)
            if local:
                check_directory(self.directory, self._options)
            primary = self._options.multiprocessing_options.primary_host
            mine = not self._options.read_only and primary in (None, jax.process_index())
            self._leftovers = Leftovers(self.directory, mine=mine)
            self._leftovers.look()
            self._orbax = ocp.CheckpointManager(self.directory, options=self._options)
        self._names = self._options.step_name_format or ocp.path.step.standard_name_format(
            step_prefix=self._options.step_prefix,
            step_format_fixed_length=self._options.step_format_fixed_length,
        )
        self._written: int | None = None  # the step that may still be on its way to the disk

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
          metrics: for options that keep the best steps, a pytree of numbers.
          force: whether to save it whatever the options say.

        Raises:
          CheckpointError: the step exists, a leaf cannot be stored, another `Manager` is saving
            into the directory, or an earlier save has failed in the background.
        """
        if self._options.read_only:
            return False
        step = step_number(step)
        self._check_new(step)
        if not force and not self._orbax.should_save(step):
            return False
        metrics = self._numbers(metrics, step)
        args = adapter_args(adapted, opt_state, step, extra)
        self.wait_until_finished()
        self._leftovers.begin(only=True)
        self._written = step
        with self._writing(f"save: step {step} in"):
            self._reload()  # another Manager may have saved meanwhile
            self._check_new(step)
            return self._orbax.save(step, args=args, metrics=metrics, force=force)

    def restore(
        self,
        params: Params,
        *,
        step: int | Literal["best"] | None = None,
        **kwargs: Unpack[Options],
    ) -> Restored[Params]:
        """Returns the state at a step; other arguments as in `restore`.

        Args:
          params: the base, as in `restore`.
          step: its number; None for the latest, ``"best"`` for that of `best_step`.
          **kwargs: as in `restore`.

        Raises:
          CheckpointError: there is no such step; or as `restore`.
        """
        self.wait_until_finished()
        steps = self.all_steps()
        if step is None:
            step = self._latest(steps)
        elif step == "best":
            step = self.best_step()
            if step is None:
                raise CheckpointError(
                    f"restore: no step in {self.directory} was saved with metrics, so none is the "
                    f"best of {steps}; name one of these"
                )
        if step not in self._orbax.all_steps():
            raise CheckpointError(
                f"restore: no step {step} in {self.directory}, which has {steps}; name one of these"
            )
        return restore(self._path(step), params, **kwargs)

    def latest_step(self) -> int | None:
        """Returns the number of the latest step, or None where there is none."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the number of the best step, of equal ones the latest; None where there is none.

        What the best is, ``best_fn`` and ``best_mode`` of the options say; steps that were saved
        without metrics do not count. Waits until what was saved is on disk.

        Raises:
          CheckpointError: the options have no ``best_fn``.
        """
        best_fn = self._options.best_fn
        if best_fn is None:
            raise CheckpointError(
                "best_step: the options have no best_fn, without which metrics are not kept; pass "
                "options=orbax.checkpoint.CheckpointManagerOptions(best_fn=..., best_mode='min' or "
                "'max')"
            )
        self.wait_until_finished()
        sign = -1 if self._options.best_mode == "min" else 1
        with explained("best_step: metrics cannot be compared in", self.directory):
            saved = {step: self._orbax.metrics(step) for step in self.all_steps()}
            ranks = {s: (sign * best_fn(m), s) for s, m in saved.items() if m is not None}
        return max(ranks, key=lambda s: ranks[s], default=None)

    def all_steps(self) -> list[int]:
        """Returns the numbers of all steps with a whole record, in order, or being written."""
        return [step for step in self._found() if not self._problem(step)]

    def wait_until_finished(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          CheckpointError: writing has failed.
        """
        with self._writing("save: writing has failed in"):
            self._orbax.wait_until_finished()
        self._done()

    def close(self) -> None:
        """Waits until what was saved is on disk, and frees Orbax's threads.

        Raises:
          CheckpointError: writing has failed.
        """
        try:
            self.wait_until_finished()
        finally:
            with explained("save: writing has failed in", self.directory):
                self._orbax.close()
            self._leftovers.remove_deleted()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Explains errors of writing, and removes what was written."""
        try:
            with explained(what, self.directory):
                yield
        except CheckpointError:
            self._settle()
            if self._written is not None:
                self._leftovers.failed(self._names.build_name(self._written))
            self._done()
            self._reload()  # Orbax has struck off those that were to go
            raise

    def _reload(self) -> None:
        with contextlib.suppress(OSError):  # steps may be going meanwhile
            self._orbax.reload()

    def _settle(self) -> None:
        """Waits for what Orbax still writes of a step that has failed, whatever comes of it."""
        with contextlib.suppress(Exception):
            self._orbax.check_for_errors()

    def _done(self) -> None:
        self._written = None
        self._leftovers.end()
        self._leftovers.remove_deleted()

    def _numbers(self, metrics: Any, step: int) -> Any:
        """Returns metrics as numbers of Python's, after a check that they can be compared."""
        remedy = "expected numbers that best_fn takes"
        with explained(f"save: metrics of step {step} in", self.directory, remedy):
            metrics = jax.tree.map(lambda x: x.item() if hasattr(x, "item") else x, metrics)
            if metrics is not None and self._options.best_fn is not None:
                self._options.best_fn(metrics)
        return metrics

    def _check_new(self, step: int) -> None:
        """Raises a `CheckpointError` unless a step comes after all that there are."""
        if step > max(self._found(), default=-1):
            return
        self.wait_until_finished()  # what is being written may fail
        self._reload()  # and somebody may have deleted steps
        found = self._found()
        if not found or step > found[-1]:
            return
        if step not in found:
            raise CheckpointError(
                f"save: step {step} is below step {found[-1]}, the latest in {self.directory}; to "
                "go on from an earlier step, use another directory or delete the later steps"
            )
        problem = f", and cannot be restored ({p})" if (p := self._problem(step)) else ""
        raise CheckpointError(
            f"save: step {step} in {self.directory} already exists{problem}; save a later one, or "
            "delete it"
        )

    def _found(self) -> list[int]:
        """Returns the numbers of all directories that are named like a step, in order."""
        return sorted(self._orbax.all_steps())

    def _latest(self, steps: list[int]) -> int:
        """Returns the latest step that can be restored, and warns of later ones that cannot."""
        found = self._found()
        if not found:
            raise CheckpointError(f"restore: no checkpoint in {self.directory}; save one first")
        if steps and steps[-1] < found[-1]:
            warnings.warn(
                f"restore: step {steps[-1]} is restored, as step {found[-1]} in {self.directory} "
                f"cannot be ({self._problem(found[-1])}); delete that one",
                stacklevel=3,
            )
        return steps[-1] if steps else found[-1]

    def _problem(self, step: int) -> str:
        """Returns why a step cannot be restored, as far as its record shows; "" if it can."""
        if step == self._written:
            return ""
        try:
            read_record(self._path(step), "plan")
        except CheckpointError as error:
            return str(error)
        return ""

    def _path(self, step: int) -> epath.Path:
        with explained(f"restore: no step {step} in", self.directory):
            return self._names.find_step(self.directory, step).path
