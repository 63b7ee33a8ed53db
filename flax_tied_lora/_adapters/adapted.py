"""`Adapted`: frozen params, trainable adapters and the plan that says how they belong together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypedDict, Unpack

import jax
from typing_extensions import TypeVar

from flax_tied_lora._adapters.not_params import NotParams
from flax_tied_lora._algebra.factor import pytree
from flax_tied_lora._planning.plan import LORA, GroupPlan, Plan
from flax_tied_lora._planning.plan_checks import COLLECTIONS
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.keys import typed_key
from flax_tied_lora._tree.paths import TiedLeaf, describe, flatten
from flax_tied_lora._tree.table import folded, table

_SCALING = "lora_scaling"
_PARAMS = "params"

# What holds the params: a dict, a FrozenDict, an `nnx.State`, any pytree with key paths.
Params = TypeVar("Params", default=Any)
# Collection -> key -> an array, or ``{"lora_a": array, ...}``.
Adapters = Mapping[str, Mapping[str, Any]]


class Fields(TypedDict, total=False):
    """The fields of an `Adapted`, as `Adapted.replace` takes them."""

    params: Any
    adapters: Any
    scaling: Mapping[str, Any]
    rng: jax.Array | None
    plan: Plan
    slot: Any


@pytree("plan")
class Adapted(NotParams, Generic[Params]):
    """Params with adapters: a pytree that takes the place of params wherever `adapt` is used.

    Attributes:
      params: the frozen params. Of a tie group one array is stored, and a leafless `TiedLeaf`
        stands where the others were.
      adapters: the trainable pytree, a collection for each kind of adapter, by key:
        ``{"lora": {group key: {"lora_a": ..., "lora_b": ...}}}``, with ``"lora_magnitude"`` for
        DoRA; and where the config asks for them ``"modules_to_save"`` (full copies),
        ``"trainable_tokens"`` (rows that replace rows) and ``"bias"``, each ``{key: array}``.
      scaling: ``{key: scalar}`` of the factors; an array leaf, so that switching, stacking and
        rescaling adapters recompiles nothing.
      rng: key for dropout, or None for no dropout; see `train`.
      plan: what was adapted; static.
      slot: which of stacked adapters these are, an integer, or one for each example; None where
        they are not chosen among. See `select`.
    """

    params: Params
    adapters: Adapters
    scaling: Mapping[str, Any]
    rng: jax.Array | None
    plan: Plan
    slot: Any = None

    def replace(self, **changes: Unpack[Fields]) -> Adapted[Params]:
        """Returns a copy with some fields replaced, usually ``adapters``.

        Raises:
          ValueError: the adapters are not of this plan's groups and shapes.
          TypeError: an unknown field.
        """
        adapters = changes.get("adapters")
        if isinstance(adapters, Mapping):
            _check_adapters("Adapted.replace", self.plan, adapters, stacked=True)
        return dataclasses.replace(self, **changes)

    def train(self, rng: jax.Array) -> Adapted[Params]:
        """Returns a copy in which dropout is on, at the config's ``lora_dropout``.

        Give each step a key of its own; `tied_lora.train.step` does so by itself. Within a step the
        key is folded by group, call site and loop step. Without a key there is no dropout.

        Args:
          rng: a key of `jax.random.key` or `jax.random.PRNGKey`.

        Raises:
          TypeError: ``rng`` is no key.
        """
        return dataclasses.replace(self, rng=typed_key("Adapted.train", rng))

    def eval(self) -> Adapted[Params]:
        """Returns a copy in which dropout is off."""
        return dataclasses.replace(self, rng=None)

    def variables(self) -> dict[str, Any]:
        """Returns plain Flax collections: ``params``, ``lora_scaling``, and the adapters'."""
        return {_PARAMS: self.params, _SCALING: self.scaling, **self.adapters}

    @classmethod
    def from_variables(cls, variables: Mapping[str, Any], plan: Plan) -> Adapted:
        """Returns what `variables` was made from, with dropout off.

        Raises:
          ValueError: a collection is missing, or the groups and shapes are not the plan's.
        """
        for name in (_PARAMS, _SCALING, LORA):
            if name not in variables:
                raise ValueError(
                    f"Adapted.from_variables: no collection {name!r}; found "
                    f"{', '.join(map(repr, variables))}"
                )
        adapters = {k: v for k, v in variables.items() if k not in (_PARAMS, _SCALING)}
        _check_adapters("Adapted.from_variables", plan, adapters)
        _check_keys(
            "Adapted.from_variables",
            _SCALING,
            variables[_SCALING],
            [a.key for _, a in plan.adapters(LORA)],
        )
        return cls(variables[_PARAMS], adapters, variables[_SCALING], None, plan)

    def __repr__(self) -> str:
        return f"Adapted({len(self.plan.adapted)} groups adapted, rank {self.plan.config.r})"

    def __str__(self) -> str:
        return summary(self)


def is_adapted(node: Any) -> bool:
    return isinstance(node, Adapted)


def check_adapted(what: str, value: Any) -> None:
    """Refuses what is no `Adapted`.

    Raises:
      TypeError: it is none.
    """
    if not isinstance(value, Adapted):
        raise TypeError(
            f"{what}: expected an Adapted, as wrap returns it, got {type(value).__name__}"
        )


def shapes_of(
    adapted: Adapted,
) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """Yields for every array of every adapter its key, its name, its shape and the plan's."""
    for group, adapter in adapted.plan.adapters():
        arrays = adapted.adapters[adapter.kind][adapter.key]
        for name, planned in group.shapes(adapter).items():
            array = unboxed(arrays[name] if name else arrays)
            if array is not ...:  # Orbax's PLACEHOLDER: what is not restored
                yield adapter.key, name or adapter.kind, tuple(array.shape), planned


def check_slots(what: str, adapted: Adapted, remedy: str, *, stacked: bool = False) -> None:
    """Refuses adapters that are stacked in slots, or where they should be, those that are not.

    Args:
      what: what errors call the function.
      remedy: what to do, for the error.
      stacked: whether they should be.

    Raises:
      ValueError: they are, or are not.
    """
    for key, name, shape, planned in shapes_of(adapted):
        if len(shape) != len(planned) + stacked:
            expected = ["slots", *planned] if stacked else list(planned)
            raise ValueError(
                f"{what}: {name} of {key!r} is {list(shape)}, expected {expected}: {remedy}"
            )


def _check_adapters(
    what: str, plan: Plan, adapters: Mapping[str, Any], stacked: bool = False
) -> None:
    """Refuses adapters of other keys and shapes than the plan's; stacked ones have more axes."""
    wanted: dict[str, list[str]] = {LORA: []}
    for _, adapter in plan.adapters():
        wanted.setdefault(adapter.kind, []).append(adapter.key)
    for kind in wanted:
        if kind not in adapters:
            raise ValueError(
                f"{what}: these are not the plan's adapters: expected a collection {kind!r}, found "
                f"{sorted(adapters)[:5]}"
            )
    for kind in COLLECTIONS:  # Others are the user's own.
        if kind in adapters:
            _check_keys(what, kind, adapters[kind], wanted.get(kind, []))
    for group, adapter in plan.adapters():
        arrays = adapters[adapter.kind][adapter.key]
        if adapter.kind == LORA and not isinstance(arrays, Mapping):
            continue
        for name, shape in group.shapes(adapter).items():
            if name and name not in arrays:
                raise ValueError(
                    f"{what}: {adapter.key!r} has no {name}, found {', '.join(map(repr, arrays))}; "
                    f"expected {', '.join(group.shapes(adapter))}"
                )
            array = arrays[name] if name else arrays
            _check_shape(what, name or adapter.kind, adapter.key, array, shape, stacked)


def _check_shape(
    what: str, name: str, key: str, array: Any, planned: tuple[int, ...], stacked: bool
) -> None:
    array = unboxed(array)
    shape = getattr(array, "shape", None)
    if shape is not None and tuple(shape[-len(planned) :] if stacked else shape) != planned:
        raise ValueError(
            f"{what}: {name} of {key!r} is {describe(array)}; the plan has {list(planned)}"
        )


def _check_keys(what: str, collection: str, given: Any, keys: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{what}: these are not the plan's adapters: {collection!r} is a "
            f"{type(given).__name__}; expected a dict"
        )
    wanted = set(keys)
    if set(given) != wanted:
        odd = {"missing": sorted(wanted - set(given)), "unknown": sorted(set(given) - wanted)}
        parts = [f"{how} {', '.join(map(repr, n[:3]))}" for how, n in odd.items() if n]
        raise ValueError(
            f"{what}: these are not the plan's adapters: in {collection!r} {'; '.join(parts)}"
        )


def summary(adapted: Adapted) -> str:
    """Returns a table of the groups, and the number of trainable parameters, each counted once."""
    leaves, _ = flatten(adapted.params)
    rows = folded((row for g in adapted.plan.groups for row in _rows(g)), sums=[5])
    trainable = sum(g.size(a) for g, a in adapted.plan.adapters())
    frozen = sum(
        math.prod(x.shape)
        for x in leaves.values()
        if not isinstance(x, TiedLeaf) and hasattr(x, "shape")
    )
    header = ("group", "also read as", "tied by", "shape", "adapter", "trainable")
    slots = _slots(adapted)
    trainable *= slots or 1
    share = 100 * trainable / max(frozen + trainable, 1)
    return (
        f"{table(header, rows)}\n"
        f"trainable: {trainable:,} of {frozen + trainable:,} parameters ({share:.2f} %)"
        + (f", in {slots} slots" if slots is not None else "")
    )


def _slots(adapted: Adapted) -> int | None:
    """Returns how many adapters are stacked; None if they are not, or are not there."""
    if adapted.adapters is None:
        return None
    for _, _, shape, planned in shapes_of(adapted):
        return shape[0] if len(shape) > len(planned) else None
    return None


def _rows(group: GroupPlan) -> list[tuple[Any, ...]]:
    others = ", ".join(
        m.path + (" (transposed)" if m.transposed else "") for m in group.members[1:]
    )
    shape = " x ".join(map(str, group.shape))
    common = group.key, others, ", ".join(group.found), shape
    return [(*common, str(a), group.size(a)) for a in group.adapters] or [(*common, "", 0)]
