"""Operations that pass a weight on, all entries in their places: cast, copied, marked or placed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint, lax

from flax_tied_lora._algebra.factor import FLOATS, RANK, Factor, NotServedError
from flax_tied_lora._interpreter.jaxprs import parameters_of
from flax_tied_lora._interpreter.registry import rule
from flax_tied_lora._interpreter.rules.layout import on_arrays, same_axes
from flax_tied_lora._tree.sharding import vary


@rule("convert_element_type")
def convert_element_type(context, eqn, weight):
    new = jnp.dtype(eqn.params["new_dtype"])
    if new.name not in FLOATS or jnp.dtype(weight.dtype).name not in FLOATS:
        raise NotServedError
    cast = on_arrays(context, eqn, lambda factor: factor)
    out = weight.rearrange(eqn.outvars[0].aval, cast, same_axes(eqn))
    return [out.replace(dtype=new)]


@rule("reduce_precision")
def reduce_precision(context, eqn, weight):
    """To no fewer bits than the weight has: what `jax.checkpoint` does to what it saves."""
    dtype = jnp.finfo(weight.dtype)
    if eqn.params["exponent_bits"] < dtype.nexp or eqn.params["mantissa_bits"] < dtype.nmant:
        raise NotServedError
    return [weight]


def _each_array(context, eqn, weight):
    """Runs an equation that does the same to any array on each array of the weight."""
    out = jax.tree.map(
        lambda a: a if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        else eqn.primitive.bind(a, **eqn.params)[0] if eqn.primitive.multiple_results
        else eqn.primitive.bind(a, **eqn.params),
        weight,
    )  # fmt: skip
    return [out]


rule("copy", "copy_p", "stop_gradient", "pcast")(_each_array)


@rule("name")
def checkpoint_name(context, eqn, weight):
    return [ad_checkpoint.checkpoint_name(weight, parameters_of(eqn)["name"])]


@rule("pvary")
def pvary(context, eqn, weight):
    """Each array varies over the mesh axes that are named; some may do so already."""
    return [jax.tree.map(lambda a: vary(a, eqn.params["axes"]), weight)]


@rule("optimization_barrier")
def optimization_barrier(context, eqn, *operands):
    return lax.optimization_barrier(list(operands))


@rule("sharding_constraint", "reshard")
def sharding_constraint(context, eqn, weight):
    """Each factor goes where the weight's axes that it has go; its rank axis is replicated."""
    name = "sharding" if "sharding" in eqn.params else "dst_sharding"
    sharding = eqn.params[name]
    spec = getattr(sharding, "spec", None)
    if spec is None:
        raise NotServedError
    whole = (*spec, *[None] * (len(weight.shape) - len(spec)))

    def to(array: Any, axes: Sequence[Any]) -> Any:
        names = jax.P(*(None if a == RANK else whole[a] for a in axes))
        params = {**eqn.params, name: jax.NamedSharding(sharding.mesh, names)}
        if free := eqn.params.get("unconstrained_dims"):
            params["unconstrained_dims"] = {i for i, a in enumerate(axes) if a in free}
        return eqn.primitive.bind(array, **params)

    def move(factor: Factor) -> Factor:
        if factor.is_array(len(weight.shape)) and factor.in_order():
            (array,) = context.run(eqn, [factor.array])
            return Factor(array, factor.axes)
        return Factor(to(factor.array, factor.axes), factor.axes)

    placed = weight.rearrange(eqn.outvars[0].aval, move, same_axes(eqn))
    if eqn.primitive.name == "reshard":  # scalars too must be of the mesh that it moves to
        placed = jax.tree.map(lambda a: a if a.ndim else to(a, ()), placed)
    return [placed]
