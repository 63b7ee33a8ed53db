"""Checkpoints with Orbax: adapters and the state of their training, or full params with their ties.

An adapter checkpoint holds the adapters, their scaling, the plan (with the config in it), a
fingerprint of the base, the step, and as asked the optimizer's state and anything else; not the
base. `save` and `restore` are for one checkpoint; `Manager` keeps the latest few of a run and
saves in the background. Both write the same files, an Orbax checkpoint of several items, each of
which Orbax reads without this library, too.
"""

from __future__ import annotations

import json
import operator
from typing import Any, NamedTuple, Self

import jax
import optax
import orbax.checkpoint as ocp

from flax_tied_lora._adapted import Adapted
from flax_tied_lora._checkpoint.fingerprint import differences, fingerprint
from flax_tied_lora._checkpoint.full_params import restore_params as restore_params
from flax_tied_lora._checkpoint.full_params import save_params as save_params
from flax_tied_lora._checkpoint.record import orbax_args, read_record, write
from flax_tied_lora._checkpoint.refit import adapter_templates, fit
from flax_tied_lora._checkpoint.stored import CheckpointError as CheckpointError
from flax_tied_lora._checkpoint.stored import (
    absolute,
    decode,
    explained,
    refuse_tracers,
    template_of,
)
from flax_tied_lora._plan import LORA, Plan


class Restored(NamedTuple):
    """What `restore` returns: ``adapted, opt_state, step, extra``."""

    adapted: Adapted
    opt_state: Any
    step: int
    extra: Any


def save(
    path: Any, adapted: Adapted, *, opt_state: Any = None, step: int = 0, extra: Any = None
) -> None:
    """Saves adapters and the state of their training, without the base, as one checkpoint.

    Args:
      path: directory to make, of a local disk or a cloud bucket. Nothing is there under this name
        until all is written.
      adapted: what `wrap` returned, trained or not, with its dropout key if it has one.
      opt_state: the optimizer's state, or None.
      step: number of the training step.
      extra: any other pytree of arrays, typed random keys and numbers: a key, a position in the
        data. None for nothing.

    Raises:
      CheckpointError: something exists at ``path``, or a leaf cannot be stored.

    Example::

      checkpoint.save("adapter", adapted, opt_state=state, step=100, extra={"rng": key})
      adapted, state, step, extra = checkpoint.restore("adapter", params, opt_state=optimizer)
    """
    write(path, _orbax_args(adapted, opt_state, step, extra))


def restore(
    path: Any,
    params: Any,
    *,
    opt_state: Any = None,
    extra: Any = None,
    sharding: Any = None,
    check_base: bool = True,
) -> Restored:
    """Returns adapters on their base again, and the state of their training.

    Args:
      path: what `save` wrote, or one step's directory of a `Manager`.
      params: the base, loaded as it was for `wrap`: tied leaves are stored once again, whatever
        arrays they come in. Abstract params (`jax.ShapeDtypeStruct`) do, too.
      opt_state: the optimizer, or a state of it (its arrays' values do not matter); None leaves
        the saved state alone.
      extra: a template of what was saved as ``extra``; without one, containers come back as
        dicts and lists.
      sharding: where the factors go. None: as `wrap` places them, like their leaf. A
        `jax.sharding.Mesh`: like their leaf's axes, or those that its box names, on that mesh. A
        `jax.sharding.Sharding` for all; or a pytree like the adapters, of shardings or of arrays
        (abstract ones, too) that have one. The optimizer's state follows the factors.
      check_base: whether ``params`` must be the base that the adapters were trained on.

    Raises:
      CheckpointError: no checkpoint, a missing or damaged file, a newer format, another base, a
        plan that does not fit ``params``, the state of another optimizer. Nothing is changed.
    """
    path = absolute(path)
    record, items = read_record(path, "plan", "base", "step")
    with explained("restore: the plan cannot be read in", path):
        plan = Plan.from_json(json.dumps(record["plan"]))
    plan, stored = fit(plan, params, check_base)
    if check_base:
        _check_base(path, record["base"], fingerprint(stored, plan), plan)
    template = template_of(path / "adapted", items["adapted"])
    saved = template.get("adapters", {})
    own = adapter_templates(plan, stored, sharding)
    own = {kind: _as_saved(tree, saved.get(kind)) for kind, tree in own.items()}
    template = {**template, "adapters": {**saved, **own}}
    state = decode(path / "adapted", items["adapted"], template)
    adapted = Adapted(stored, state["adapters"], state["scaling"], state.get("rng"), plan)
    if isinstance(opt_state, optax.GradientTransformation):
        opt_state = opt_state.init(adapted.adapters)
    for name, asked in (("opt_state", opt_state), ("extra", extra)):
        if asked is not None and name not in items:
            raise CheckpointError(
                f"restore: no {name} in {path}, which has {', '.join(sorted(items))}; it was saved "
                f"without. Leave {name}= out"
            )
    if opt_state is not None:
        opt_state = decode(path / "opt_state", items["opt_state"], opt_state)
    if "extra" in items:
        if extra is None:
            extra = template_of(path / "extra", items["extra"]) if items["extra"] else {}
        extra = decode(path / "extra", items["extra"], extra)
    return Restored(adapted, opt_state, record["step"], extra)


class Manager:
    """The checkpoints of a run: a thin face of `orbax.checkpoint.CheckpointManager`.

    Saving is asynchronous: it returns once the arrays are copied, so that a training step may
    donate them, and the files are written in the background. A step that was cut off while it was
    written is never taken for a checkpoint.

    Args:
      directory: of the run; made if it is not there.
      max_to_keep: how many of the latest steps to keep; None for all.
      options: Orbax's own options instead.

    Example::

      with checkpoint.Manager("run", max_to_keep=3) as manager:
          if manager.latest_step() is not None:
              adapted, state, step, extra = manager.restore(params, opt_state=optimizer)
          ...
          manager.save(step, adapted, opt_state=state)
    """

    def __init__(
        self,
        directory: Any,
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
          force: save whatever the options say.

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
        args = _orbax_args(adapted, opt_state, step, extra)
        with explained(f"save: step {step} in", self.directory):
            return self._orbax.save(step, args=args, metrics=metrics, force=force)

    def restore(self, params: Any, *, step: int | None = None, **kwargs: Any) -> Restored:
        """Returns the state at a step, by default the latest. Takes what `restore` takes.

        Raises:
          CheckpointError: there is no such step; and all that `restore` raises.
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
        """Returns the numbers of the steps that there are."""
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


def _orbax_args(adapted: Any, opt_state: Any, step: Any, extra: Any) -> ocp.args.Composite:
    if not isinstance(adapted, Adapted):
        raise CheckpointError(
            f"save: adapted is a {type(adapted).__name__}; expected an Adapted, as wrap returns it "
            "(save_params saves plain params)"
        )
    with explained("save:", f"step={step!r}", "expected an int of at least 0"):
        step = operator.index(step)
        if step < 0:
            raise ValueError("below 0")
    with explained("save: adapted does not fit", "its plan", "save stacked adapters one by one"):
        Adapted.from_variables(adapted.variables(), adapted.plan)
    state = {"adapters": adapted.adapters, "scaling": adapted.scaling}
    if adapted.rng is not None:
        state["rng"] = adapted.rng
    items = {"adapted": state, "opt_state": opt_state, "extra": extra}
    for name, tree in {"params": adapted.params, **items}.items():
        refuse_tracers(name, tree)
    facts = {
        "step": step,
        "plan": json.loads(adapted.plan.to_json()),
        "base": fingerprint(adapted.params, adapted.plan),
    }
    return orbax_args(facts, items)


def _check_base(path: Any, saved: Any, given: Any, plan: Plan) -> None:
    lines = differences(saved, given)
    if not lines:
        return
    remedy = (
        "Load the base that they were trained on, or pass check_base=False to put them on this one "
        "all the same"
    )
    if any(adapter.residual for _, adapter in plan.adapters(LORA)):
        remedy = (
            f"init_lora_weights={plan.config.init_lora_weights!r} took the factors' first values "
            "out of the base, and they belong on the residual: pass wrap(params, config).params, "
            "with the same rng as before"
        )
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    raise CheckpointError(
        f"restore: these params are not the base of the adapters in {path}: "
        f"{'; '.join(lines[:3])}{more}. {remedy}"
    )


def _as_saved(factors: Any, saved: Any) -> Any:
    """Returns the factors' templates in the dtypes that were saved."""

    def one(factor: Any, saved: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(factor.shape, saved.dtype, sharding=factor.sharding)

    leaves, treedef = jax.tree.flatten(factors)
    dtypes = jax.tree.leaves(saved)
    if len(dtypes) != len(leaves):
        return factors  # These are not the plan's factors, as reading them will say.
    return jax.tree.unflatten(treedef, map(one, leaves, dtypes))
