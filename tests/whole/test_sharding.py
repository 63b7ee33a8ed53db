"""Meshes: Auto and Explicit axes on eight host devices give the single-device result."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import flax_tied_lora as tied_lora

V, D, H, R = 32, 16, 24, 4
LAYOUTS = {
    "by vocabulary": ({"table": jax.P("x", None), "kernel": jax.P(None, "x")}),
    "by width": ({"table": jax.P(None, "x"), "kernel": jax.P("x", None)}),
    "both": ({"table": jax.P("x", "y"), "kernel": jax.P("y", "x")}),
    "replicated": ({"table": jax.P(), "kernel": jax.P()}),
}
CONFIG = tied_lora.LoraConfig(r=R, lora_alpha=8, target_modules=["embed", "dense"])


def params() -> dict[str, Any]:
    k1, k2 = jax.random.split(jax.random.key(0))
    return {
        "embed": {"embedding": jax.random.normal(k1, (V, D))},
        "dense": {"kernel": jax.random.normal(k2, (D, D)) / 4},
    }


def auto_model(params: Any, tokens: jax.Array) -> jax.Array:
    x = params["embed"]["embedding"][tokens]
    x = jnp.tanh(x @ params["dense"]["kernel"])
    return x @ params["embed"]["embedding"].T


def explicit_model(params: Any, tokens: jax.Array) -> jax.Array:
    """The same, saying where results go as Explicit axes want it."""
    table, rows = params["embed"]["embedding"], jax.P("y")
    x = table.at[tokens].get(out_sharding=rows)
    x = jnp.tanh(jnp.dot(x, params["dense"]["kernel"], out_sharding=rows))
    return jnp.dot(x, table.T, out_sharding=rows)


def perturbed(adapted: tied_lora.Adapted) -> tied_lora.Adapted:
    keys = iter(jax.random.split(jax.random.key(1), 100))

    def shift(x: jax.Array) -> jax.Array:
        noise = jax.random.normal(next(keys), x.shape) / 4
        return x + jax.device_put(noise, x.sharding)

    return adapted.replace(adapters=jax.tree.map(shift, adapted.adapters))


def placed(tree: Any, mesh: Any, specs: Any) -> Any:
    def put(array: jax.Array, spec: Any) -> jax.Array:
        return jax.device_put(array, jax.NamedSharding(mesh, spec))

    return {
        "embed": {"embedding": put(tree["embed"]["embedding"], specs["table"])},
        "dense": {"kernel": put(tree["dense"]["kernel"], specs["kernel"])},
    }


def loss_and_grads(model: Any) -> Any:
    apply = tied_lora.adapt(model, on_dense="error")

    def loss(adapted: Any, tokens: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(apply(adapted, tokens)))

    def both(adapted: Any, tokens: jax.Array) -> Any:
        return apply(adapted, tokens), tied_lora.value_and_grad(loss)(adapted, tokens)

    return both


@pytest.fixture(scope="module")
def expected() -> Any:
    tokens = jnp.arange(8) * 3
    return loss_and_grads(auto_model)(perturbed(tied_lora.wrap(params(), CONFIG)), tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_mesh_gives_the_single_device_result(kind, layout, expected):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    model = auto_model if kind is AxisType.Auto else explicit_model
    tokens = jax.device_put(jnp.arange(8) * 3, jax.NamedSharding(mesh, jax.P("y")))
    with jax.set_mesh(mesh):
        adapted = tied_lora.wrap(placed(params(), mesh, LAYOUTS[layout]), CONFIG)
        adapted = perturbed(adapted)
        found = jax.jit(loss_and_grads(model))(adapted, tokens)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Gradients are sums of up to 156, in another order on a mesh: eight roundings of that.
        size = np.max(np.abs(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=max(2e-5, 1e-6 * size))
    grads = found[1][1]["lora"]["embed/embedding"]
    for name, factor in adapted.adapters["lora"]["embed/embedding"].items():
        assert grads[name].sharding.is_equivalent_to(factor.sharding, 2) or kind is AxisType.Auto


def same_places(tree: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(x.sharding.is_equivalent_to(y.sharding, y.ndim) for x, y in pairs)


@pytest.fixture(scope="module", params=["by vocabulary", "by width"])
def on_auto_axes(request) -> Any:
    """An `Adapted`, its loss and tokens; left alone, XLA places some of the gradients otherwise."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    adapted = perturbed(tied_lora.wrap(placed(params(), mesh, LAYOUTS[request.param]), CONFIG))
    apply = tied_lora.adapt(auto_model, on_dense="error")
    tokens = jax.device_put(jnp.arange(8) * 3, jax.NamedSharding(mesh, jax.P("y")))
    return adapted, lambda a, t: jnp.sum(jnp.sin(apply(a, t))), tokens


def test_gradients_outside_of_jit_are_where_their_factors_are(on_auto_axes, expected):
    adapted, loss, tokens = on_auto_axes
    _, grads = tied_lora.value_and_grad(jax.jit(loss))(adapted, tokens)
    assert same_places(grads, adapted.adapters)
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, grads), jax.tree.map(np.asarray, expected[1][1]), rtol=2e-5,
        atol=2e-4,
    )  # fmt: skip


@pytest.mark.usefixtures("standard_promotion")
def test_a_training_step_on_auto_axes_leaves_arrays_where_they_are(on_auto_axes, expected):
    """With gradients constrained to their factors' shardings, the state's and results' follow."""
    adapted, loss, tokens = on_auto_axes
    optimizer, own = optax.adam(1e-2), jax.tree.map(lambda x: x.sharding, adapted.adapters)

    @jax.jit
    def step(adapters: Any, state: Any, frozen: Any, tokens: Any) -> Any:
        replaced = frozen.replace(adapters=adapters)
        value, grads = tied_lora.value_and_grad(loss)(replaced, tokens)
        grads = jax.lax.with_sharding_constraint(grads, own)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state: Any = optimizer.init(adapted.adapters)
    assert same_places(state[0].mu, adapted.adapters)
    adapters, (moments, *_), value = step(adapted.adapters, state, adapted, tokens)
    assert all(same_places(x, adapted.adapters) for x in (adapters, moments.mu, moments.nu))
    np.testing.assert_allclose(value, expected[1][0], rtol=2e-5)
    # Adam's first step goes by the gradients' signs; its first moment is a tenth of them.
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, moments.mu),
        jax.tree.map(lambda x: np.asarray(x) / 10, expected[1][1]), rtol=2e-5, atol=2e-5,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_an_adapter_for_each_example_on_a_mesh(kind):
    def model(params: Any, tokens: jax.Array) -> jax.Array:
        table, anywhere = params["embed"]["embedding"], jax.P()
        if kind is AxisType.Auto:
            return auto_model(params, tokens)
        x = table.at[tokens].get(out_sharding=anywhere)
        x = jnp.tanh(jnp.dot(x, params["dense"]["kernel"], out_sharding=anywhere))
        return jnp.dot(x, table.T, out_sharding=anywhere)

    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        tree = placed(params(), mesh, LAYOUTS["both"])
        fresh = tied_lora.wrap(tree, CONFIG)
        stacked = tied_lora.stack([perturbed(fresh)], capacity=3)
        full = tied_lora.put(stacked, 2, fresh.replace(
            adapters=jax.tree.map(lambda x: 2 * x, perturbed(fresh).adapters)
        ))  # fmt: skip
        for new, old in zip(jax.tree.leaves(full), jax.tree.leaves(stacked), strict=True):
            assert new.sharding == old.sharding
        run = jax.jit(tied_lora.per_example(tied_lora.adapt(model, on_dense="error")))
        tokens, slots = np.arange(8).reshape(4, 2) * 3, [2, 0, -1, 2]
        found = np.asarray(run(tied_lora.select(full, slots), tokens))
    alone = perturbed(tied_lora.wrap(params(), CONFIG))
    twice = alone.replace(adapters=jax.tree.map(lambda x: 2 * x, alone.adapters))
    plain = jax.jit(auto_model)
    for row, own in enumerate([twice, alone, None, twice]):
        merged = params() if own is None else tied_lora.merge(own)
        expected = plain(merged, tokens[row : row + 1])[0]
        np.testing.assert_allclose(found[row], expected, rtol=2e-5, atol=1e-4)


def everywhere(params: Any, tokens: jax.Array) -> jax.Array:
    """The model on Explicit axes, its logits split over the vocabulary too."""
    table, rows = params["embed"]["embedding"], jax.P("y")
    x = table.at[tokens].get(out_sharding=rows)
    x = jnp.tanh(jnp.dot(x, params["dense"]["kernel"], out_sharding=rows))
    return jnp.dot(x, table.T, out_sharding=jax.P("y", "x"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transposed_tie_on_explicit_axes(layout):
    """What is looked up is stored as its transpose: a leaf called embedding is, whatever it is."""

    def model(params: Any, tokens: jax.Array, **places: Any) -> jax.Array:
        x = params["dense"]["kernel"].at[tokens].get(**places)
        return jnp.dot(jnp.tanh(x), params["embed"]["embedding"], **places)

    def tied(on: Any = None) -> tied_lora.Adapted:
        table = params()["embed"]["embedding"]
        tree = {"embed": {"embedding": table.T}, "dense": {"kernel": table}}
        tree = tree if on is None else placed(tree, on, LAYOUTS[layout])
        adapted = tied_lora.wrap(tree, CONFIG, ties=[("embed/embedding", "dense/kernel")])
        assert adapted.plan.groups[0].key == "embed/embedding"
        return perturbed(adapted)

    tokens = jnp.arange(8) * 3
    expected = loss_and_grads(model)(tied(), tokens)
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)) as _:
        mesh = jax.sharding.get_mesh()
        tokens = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("y")))
        step = loss_and_grads(functools.partial(model, out_sharding=jax.P("y")))
        found = jax.jit(step)(tied(mesh), tokens)
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected), rtol=2e-5, atol=2e-4
    )


OTHERS = {
    "replaced rows": {"trainable_token_indices": {"embed": [3, 0, 9]}},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("layout", ["by vocabulary", "both"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_on_explicit_axes(kind, layout):
    config = dataclasses.replace(CONFIG, **OTHERS[kind])
    tokens = jnp.arange(8) * 3
    expected = loss_and_grads(auto_model)(perturbed(tied_lora.wrap(params(), config)), tokens)
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)) as _:
        mesh = jax.sharding.get_mesh()
        adapted = perturbed(tied_lora.wrap(placed(params(), mesh, LAYOUTS[layout]), config))
        tokens = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("y")))
        found = jax.jit(loss_and_grads(everywhere))(adapted, tokens)
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected), rtol=2e-5, atol=2e-4
    )
    for grad, factor in zip(
        jax.tree.leaves(found[1][1]), jax.tree.leaves(adapted.adapters), strict=True
    ):
        assert grad.sharding.is_equivalent_to(factor.sharding, factor.ndim)
