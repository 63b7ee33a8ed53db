"""`save` and `restore`: one checkpoint of adapters and of the state of their training."""

from __future__ import annotations

import json
import operator
import os
from typing import Any, Generic, NamedTuple

import jax
import orbax.checkpoint as ocp

from flax_tied_lora._adapters.adapted import Adapted, Params
from flax_tied_lora._adapters.fingerprint import differences, fingerprint
from flax_tied_lora._checkpoint.errors import CheckpointError, explained
from flax_tied_lora._checkpoint.items import decode, refuse_tracers, template_of
from flax_tied_lora._checkpoint.record import absolute, orbax_args, read_record, write
from flax_tied_lora._checkpoint.refit import adapter_templates, fit
from flax_tied_lora._planning.plan import LORA, Plan
from flax_tied_lora._tree.foreign import refuse_models


class Restored(NamedTuple, Generic[Params]):
    """What `restore` returns: ``adapted, opt_state, step, extra``."""

    adapted: Adapted[Params]
    opt_state: Any
    step: int
    extra: Any


def save(
    path: str | os.PathLike[str],
    adapted: Adapted,
    *,
    opt_state: Any = None,
    step: int = 0,
    extra: Any = None,
) -> None:
    """Saves adapters and the state of their training, without the base, as one checkpoint.

    Args:
      path: directory to make, on a local disk or in a cloud bucket; it has this name only when all
        of it is written.
      adapted: what `wrap` returned, trained or not, with its dropout key if it has one.
      opt_state: the optimizer's state, or None.
      step: number of the training step.
      extra: any other pytree of arrays, typed random keys and numbers, for example a position in
        the data; or None.

    Raises:
      CheckpointError: something exists at ``path``, another save to it is running, or a leaf cannot
        be stored.

    Example::

      checkpoint.save("adapter", adapted, opt_state=state, step=100, extra={"rng": key})
      adapted, state, step, extra = checkpoint.restore("adapter", params, opt_state=optimizer)
    """
    write(path, adapter_args(adapted, opt_state, step, extra))


def restore(
    path: str | os.PathLike[str],
    params: Params,
    *,
    opt_state: Any = None,
    extra: Any = None,
    sharding: Any = None,
    check_base: bool = True,
) -> Restored[Params]:
    """Returns saved adapters on their base, and the state of their training.

    Args:
      path: what `save` wrote, or one step's directory of a `Manager`.
      params: the base, loaded as it was for `wrap`; copies of tied leaves become one array again.
        Abstract params (`jax.ShapeDtypeStruct`) are fine.
      opt_state: the optimizer (anything with ``init`` and ``update``, as Optax has them), or a
        state of it as a template (its values do not matter); None does not restore the saved
        state. Containers may be others than were saved: an `nnx.Optimizer` and its state are each
        other's templates.
      extra: a template of what was saved as ``extra``; without one, containers are restored as
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
    refuse_models("restore", params)
    path = absolute(path)
    record, items = read_record(path, "plan")
    with explained("restore: the plan cannot be read in", path):
        plan = Plan.from_json(json.dumps(record["plan"]))
    plan, stored = fit(plan, params, check_base)
    if check_base:
        _check_base(path, record["base"], fingerprint(stored, plan), plan)
    template = template_of(path / "adapted", items["adapted"])
    saved = template.get("adapters", {})
    of_plan = adapter_templates(plan, stored, sharding)
    of_plan = {kind: _as_saved(tree, saved.get(kind)) for kind, tree in of_plan.items()}
    template = {**template, "adapters": {**saved, **of_plan}}
    state = decode(path / "adapted", items["adapted"], template)
    adapted = Adapted(stored, state["adapters"], state["scaling"], state.get("rng"), plan)
    if _is_optimizer(opt_state):
        with explained("restore: opt_state.init fails for the adapters in", path):
            opt_state = opt_state.init(adapted.adapters)
    for name, wanted in (("opt_state", opt_state), ("extra", extra)):
        if wanted is not None and name not in items:
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


def adapter_args(adapted: Any, opt_state: Any, step: Any, extra: Any) -> ocp.args.Composite:
    """Returns Orbax's arguments for writing a checkpoint of adapters; see `save`.

    Raises:
      CheckpointError: not an `Adapted`, the step is not a number, or a leaf cannot be stored.
    """
    if not isinstance(adapted, Adapted):
        raise CheckpointError(
            f"save: adapted is a {type(adapted).__name__}; expected an Adapted, as wrap returns it "
            "(save_params saves plain params)"
        )
    step = step_number(step)
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


def step_number(step: Any) -> int:
    """Returns a step's number, checked."""
    with explained("save:", f"step={step!r}", "expected an int of at least 0"):
        number = operator.index(step)
        if number < 0:
            raise ValueError("below 0")
        return number


def _is_optimizer(opt_state: Any) -> bool:
    return all(callable(getattr(opt_state, name, None)) for name in ("init", "update"))


def _check_base(path: Any, saved: Any, given: Any, plan: Plan) -> None:
    """Checks the saved fingerprint of the base against that of the given params."""
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
    """Returns the templates of factors in the dtypes that were saved."""

    def cast(factor: Any, saved: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(factor.shape, saved.dtype, sharding=factor.sharding)

    leaves, treedef = jax.tree.flatten(factors)
    dtypes = jax.tree.leaves(saved)
    if len(dtypes) != len(leaves):
        return factors  # They are not the plan's factors: reading them raises the error.
    return jax.tree.unflatten(treedef, map(cast, leaves, dtypes))
