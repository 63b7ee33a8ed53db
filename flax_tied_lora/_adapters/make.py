"""The adapters of a plan: made, placed like their leaf, boxed like their leaf."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._algebra.factor import RANK, take
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._tree.boxes import boxed_like, names_along
from flax_tied_lora._tree.keys import key_number, uncommitted
from flax_tied_lora._tree.paths import is_tracer
from flax_tied_lora._tree.quantized_array import array_of, is_quantized
from flax_tied_lora._tree.sharding import shard_count

DTYPE = jnp.float32


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Factors that are made alike: in one go."""

    shape: tuple[int, ...]
    init: str  # "zeros", "normal" (deviation scale) or "uniform" (up to scale)
    scale: float
    sharding: Any


def make_adapters(
    plan: Plan, leaves: Mapping[str, Any], boxes: Mapping[str, Any], rng: jax.Array
) -> dict[str, dict[str, Any]]:
    """Returns the adapters of a plan: ``{kind: {key: array, or factors by name}}``.

    A kernel starts with random ``lora_a`` and zero ``lora_b``, a table with zero ``lora_a`` and
    normal ``lora_b``, as ``peft.tuners.lora.layer.LoraLayer.reset_lora_parameters`` has it. Copies,
    replaced rows and biases start as what they stand in for, a magnitude as the norm of the
    columns. All are float32. What belongs to an abstract leaf is abstract, and to a sharded leaf
    sharded: rows as its rows, columns as its columns, rank replicated.

    Factors that start from the weight itself (PiSSA) start as zeros here; `start_from_weights`
    fills them in.

    Args:
      leaves: the params, by path.
      boxes: boxes of those leaves that have one (`flax.core.meta.AxisMetadata`).
      rng: each factor's random key is the adapter's key and the factor's name folded into it, so
        the order of targets never matters.
    """
    made: dict[_Kind, list[tuple[str, str]]] = {}
    arrays: dict[tuple[str, str, str], Any] = {}
    for group, adapter in plan.adapters():
        leaf = leaves[group.key]
        for name, shape in group.shapes(adapter).items():
            sharding = _sharding(leaf, group.axes(adapter)[name], shape)
            where = adapter.kind, adapter.key, name
            if isinstance(array_of(leaf), jax.ShapeDtypeStruct):
                arrays[where] = jax.ShapeDtypeStruct(shape, DTYPE, sharding=sharding)
            elif name in ("lora_a", "lora_b"):
                kind = _Kind(shape, *_init(plan, group, adapter, name), sharding)
                made.setdefault(kind, []).append((adapter.key, name))
            else:
                arrays[where] = _from_leaf(group, adapter, leaf, sharding)
    rng = uncommitted(rng) if made else rng
    for kind, places in made.items():
        numbers = np.array([key_number(f"{key}/{name}") for key, name in places], np.uint32)
        for (key, name), array in zip(places, _arrays(kind, rng, numbers), strict=True):
            arrays[LORA, key, name] = array
    adapters: dict[str, dict[str, Any]] = {LORA: {}}
    for group, adapter in plan.adapters():
        values = {}
        for name, axes in group.axes(adapter).items():
            array = arrays[adapter.kind, adapter.key, name]
            box = boxes.get(group.key)
            values[name] = array if box is None else boxed_like(box, axes, array)
        adapters.setdefault(adapter.kind, {})[adapter.key] = values.get("", values)
    return adapters


def _from_leaf(group: GroupPlan, adapter: AdapterPlan, leaf: Any, sharding: Any) -> Any:
    """Returns the first values of what stands in for a leaf, or for a part of it."""

    def make(array: Any) -> Any:
        array = array.dequantize() if is_quantized(array) else jnp.asarray(array)
        array = array.astype(DTYPE)
        if adapter.kind == LORA:
            order = [i for i in range(array.ndim) if i not in group.rows]
            norms = jnp.sqrt(jnp.sum(jnp.square(array), axis=group.rows))
            return jnp.transpose(norms, [order.index(a) for a in (*group.batch, *group.cols)])
        if adapter.kind == TRAINABLE_TOKENS:
            axis = group.token_axis
            return jnp.moveaxis(take(array, jnp.asarray(adapter.tokens), axis), axis, 0)
        return jnp.copy(array)  # trained, and donated: never the frozen leaf itself

    return make(leaf) if is_tracer(array_of(leaf)) else jax.jit(make, out_shardings=sharding)(leaf)


def _init(plan: Plan, group: GroupPlan, adapter: AdapterPlan, name: str) -> tuple[str, float]:
    how = plan.config.init_lora_weights
    if adapter.residual:
        return "zeros", 0.0
    # torch.nn.Linear's default, kaiming_uniform(a=sqrt(5)), is uniform up to 1 / sqrt(inputs).
    inputs = math.prod(group.shape[a] for a in group.rows) if name == "lora_a" else adapter.rank
    uniform = ("uniform", 1 / math.sqrt(inputs))
    if how is False:
        return ("normal", 1.0) if group.is_table else uniform
    if name == ("lora_a" if group.is_table else "lora_b"):
        return "zeros", 0.0
    if group.is_table and not group.is_head(adapter):
        return "normal", 1.0
    if group.is_table:  # PEFT's Linear: uniform over the width
        uniform = "uniform", 1 / math.sqrt(math.prod(group.shape[a] for a in group.cols))
    return ("normal", 1 / adapter.rank) if how == "gaussian" else uniform


def _arrays(kind: _Kind, rng: jax.Array, numbers: np.ndarray) -> Sequence[Any]:
    if is_tracer(rng) and kind.sharding is None:
        return [_array(kind, rng, number) for number in numbers]
    if kind.sharding is not None or len(numbers) == 1:
        # Made in place: no device ever holds a factor that it does not own a part of.
        make = _compiled(kind, stacked=False)
        return [make(rng, number) for number in numbers]
    # One by one, ten thousand factors would take seconds: made in one array, put in one go.
    if kind.init == "zeros":
        return jax.device_put(list(np.zeros((len(numbers), *kind.shape), DTYPE)))
    return jax.device_put(list(np.asarray(_compiled(kind, stacked=True)(rng, numbers))))


def _array(kind: _Kind, rng: jax.Array, number: Any) -> jax.Array:
    if kind.init == "zeros":
        return jnp.zeros(kind.shape, DTYPE)
    key = jax.random.fold_in(rng, number)
    if kind.init == "normal":
        return kind.scale * jax.random.normal(key, kind.shape, DTYPE)
    return jax.random.uniform(key, kind.shape, DTYPE, -kind.scale, kind.scale)


@functools.lru_cache(maxsize=256)
def _compiled(kind: _Kind, stacked: bool) -> Any:
    """Returns the compiled maker of a kind: one for all calls of wrap, which compile only once."""
    one = functools.partial(_array, kind)
    make = jax.vmap(one, in_axes=(None, 0)) if stacked else one
    return jax.jit(make, out_shardings=kind.sharding)


def _sharding(leaf: Any, axes: Sequence[Any], shape: Sequence[int]) -> Any:
    """Returns a factor's sharding: that of its leaf, axis by axis; None where there is none.

    What is left of an axis in a part of a fused leaf may be too little for that.
    """
    leaf = array_of(leaf)
    sharding = None if is_tracer(leaf) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding):
        return None
    names = [
        None if a != RANK and n != leaf.shape[a] and n % shard_count(sharding.mesh, name) else name
        for a, n, name in zip(axes, shape, names_along(sharding.spec, axes), strict=True)
    ]
    return jax.NamedSharding(sharding.mesh, jax.P(*names), memory_kind=sharding.memory_kind)
