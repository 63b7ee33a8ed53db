"""By hand on a mesh: `shard_map` with a split table, and a pipeline of stacked layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import flax_tied_lora as tied_lora
from tests.helpers.full_logits import assert_same
from tests.helpers.oracle import array, numbers, perturbed

V, D, B = 64, 16, 8
P = jax.P


def mesh(*sizes: int, names: tuple[str, ...]) -> jax.sharding.Mesh:
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def both(function: Any, adapted: Any, *data: Any) -> tuple[Any, Any]:
    """Returns value and gradients of the adapted function, and of the function of merged params."""
    served = tied_lora.adapt(function, on_dense="error")

    def ours(adapters: Any) -> Any:
        return served(adapted.replace(adapters=adapters), *data)

    def merged(adapters: Any) -> Any:
        return function(tied_lora.merge(adapted.replace(adapters=adapters)), *data)

    return tuple(jax.jit(jax.value_and_grad(f))(adapted.adapters) for f in (ours, merged))


TABLE, TOKENS = {"embed": {"embedding": array(V, D, seed=1)}}, numbers(B, below=V)
TIED = tied_lora.LoraConfig(r=2, lora_alpha=4, target_modules=["embed"])


def by_vocabulary(params: Any, tokens: Any) -> Any:
    """Each device looks up and scores the rows that it has; tokens are split over another axis."""

    def local(table: Any, tokens: Any) -> Any:
        start = lax.axis_index("model") * table.shape[0]
        own = tokens - start
        here = (own >= 0) & (own < table.shape[0])
        rows = table.at[jnp.where(here, own, 0)].get(mode="clip")
        x = lax.psum(jnp.where(here[:, None], rows, 0), "model")
        logits = jnp.tanh(x) @ table.T
        return lax.psum(jnp.sum(jnp.sin(logits)), ("data", "model"))

    on = mesh(2, 4, names=("data", "model"))
    return jax.shard_map(local, mesh=on, in_specs=(P("model"), P("data")), out_specs=P())(
        params["embed"]["embedding"], tokens
    )


def by_width(params: Any, tokens: Any) -> Any:
    """Each device has some columns of the table; products are summed over devices."""

    def local(table: Any, tokens: Any) -> Any:
        logits = lax.psum(jnp.tanh(table[tokens]) @ table.T, "model")
        return lax.psum(jnp.sum(jnp.sin(logits)), "data")

    on = mesh(2, 4, names=("data", "model"))
    return jax.shard_map(local, mesh=on, in_specs=(P(None, "model"), P("data")), out_specs=P())(
        params["embed"]["embedding"], tokens
    )


@pytest.mark.parametrize("function", [by_vocabulary, by_width])
def test_a_table_split_by_hand(function):
    assert_same(*both(function, perturbed(tied_lora.wrap(TABLE, TIED)), TOKENS))


def test_adapted_within_the_shard_map():
    """Each device adapts the function of its part, and has its part of the factors."""
    adapted = perturbed(tied_lora.wrap(TABLE, TIED))
    on = mesh(2, 4, names=("data", "model"))

    def local_loss(params: Any, tokens: Any) -> Any:
        table = params["embed"]["embedding"]
        return lax.psum(jnp.sum(jnp.sin(jnp.tanh(tokens) @ table.T)), ("data", "model"))

    def run(adapters: Any, x: Any) -> Any:
        whole = adapted.replace(adapters=adapters)
        rows = jax.tree.map(lambda a: P("model") if a.shape[:1] == (V,) else P(), whole)
        local = jax.shard_map(
            tied_lora.adapt(local_loss, on_dense="error"),
            mesh=on, in_specs=(rows, P("data")), out_specs=P(),
        )  # fmt: skip
        return local(whole, x)

    def merged(adapters: Any, x: Any) -> Any:
        table = tied_lora.merge(adapted.replace(adapters=adapters))["embed"]["embedding"]
        return jnp.sum(jnp.sin(jnp.tanh(x) @ table.T))

    x = array(B, D, seed=3)
    ours, theirs = (jax.jit(jax.value_and_grad(f))(adapted.adapters, x) for f in (run, merged))
    assert_same(ours, theirs)


STAGES, LAYERS, MICROBATCHES = 4, 2, 3
PIPELINE = {
    "embed": {"embedding": array(V, D, seed=1)},
    "layers": {"kernel": array(STAGES, LAYERS, D, D, seed=2) / 4},
}
BATCHES = numbers(MICROBATCHES, B, below=V)


def pipeline(params: Any, tokens: Any) -> Any:
    """GPipe (arXiv:1811.06965): microbatches go from stage to stage, each with its own layers."""

    def stage(kernels: Any, x: Any) -> Any:
        return lax.scan(lambda x, kernel: (x + jnp.tanh(x @ kernel), None), x, kernels)[0]

    def local(kernels: Any, inputs: Any) -> Any:
        kernels, number = kernels[0], lax.axis_index("stage")
        steps = MICROBATCHES + STAGES - 1

        def step(held: Any, at: Any) -> Any:
            fresh = lax.dynamic_index_in_dim(inputs, jnp.minimum(at, MICROBATCHES - 1), 0, False)
            out = stage(kernels, jnp.where(number == 0, fresh, held))
            return lax.ppermute(out, "stage", [(i, i + 1) for i in range(STAGES - 1)]), out

        start = lax.pcast(jnp.zeros_like(inputs[0]), "stage", to="varying")
        _, outs = lax.scan(step, start, jnp.arange(steps))
        last = jnp.where(number == STAGES - 1, outs[STAGES - 1 :], 0)
        return lax.psum(last, "stage")

    table = params["embed"]["embedding"]
    on = mesh(STAGES, 2, names=("stage", "data"))
    x = jax.shard_map(
        local, mesh=on, in_specs=(P("stage"), P(None, "data")), out_specs=P(None, "data")
    )(params["layers"]["kernel"], table[tokens])
    return jnp.sum(jnp.sin(x @ table.T))


def test_a_pipeline_of_stacked_layers():
    on = mesh(STAGES, 2, names=("stage", "data"))
    specs = {"embed": {"embedding": P("data")}, "layers": {"kernel": P("stage")}}
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, jax.NamedSharding(on, s)), PIPELINE, specs
    )  # fmt: skip
    config = tied_lora.LoraConfig(
        r=2, lora_alpha=4, target_modules=["embed", "layers"],
    )  # fmt: skip
    sites = tied_lora.trace(pipeline, placed, BATCHES)
    adapted = tied_lora.wrap(placed, config, sites=sites)
    for factor in adapted.adapters["lora"]["layers/kernel"].values():
        assert factor.shape[:2] == (STAGES, LAYERS)
        assert factor.sharding.spec[0] == "stage"
        assert factor.addressable_shards[0].data.shape[0] == 1
    plain = pipeline(placed, BATCHES)
    x = PIPELINE["embed"]["embedding"][BATCHES]
    for kernel in PIPELINE["layers"]["kernel"].reshape(-1, D, D):
        x = x + jnp.tanh(x @ kernel)
    expected = jnp.sum(jnp.sin(x @ PIPELINE["embed"]["embedding"].T))
    np.testing.assert_allclose(plain, expected, rtol=1e-4)
    assert_same(*both(pipeline, perturbed(adapted, size=0.2), BATCHES))
