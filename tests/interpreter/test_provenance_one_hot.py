"""One-hot data: which axis is one-hot, and whether a product over it is a lookup."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._interpreter.provenance import Provenance
from tests.helpers.oracle import check, wrapped

V, D = 6, 4
IDS = jnp.array([[0, 2, 5], [1, 1, 3]])
TABLE = jnp.arange(V * D, dtype=jnp.float32).reshape(V, D) / 10


def axes(fn: Any, *args: Any) -> set[int]:
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    provenance = Provenance()
    provenance.enter(jaxpr)
    return set(provenance.one_hot_axes(jaxpr.outvars[0]))


HOT = {
    "one_hot": (lambda i: jax.nn.one_hot(i, V), {2}),
    "another axis": (lambda i: jax.nn.one_hot(i, V, axis=1), {1}),
    "compared by hand": (
        lambda i: (i[..., None] == jnp.arange(V)[None, None]).astype(jnp.float32),
        {2},
    ),
    "from an offset": (lambda i: i[..., None] == jnp.arange(V)[None, None] + 3, {2}),
    "an iota that is broadcast": (lambda i: jnp.arange(V)[:, None, None] == i[None], {0}),
    "an identity's rows": (lambda i: jnp.eye(V)[i], {2}),
    "an identity": (lambda i: jnp.eye(V), {0, 1}),
    "transposed": (lambda i: jnp.moveaxis(jax.nn.one_hot(i, V), 2, 0), {0}),
    "flattened tokens": (lambda i: jax.nn.one_hot(i, V).reshape(-1, V), {1}),
    "an axis of one beside": (lambda i: jax.nn.one_hot(i, V).reshape(2, 3, 1, V), {3}),
    "features flattened": (lambda i: jax.nn.one_hot(i, V).reshape(2, -1), set()),
    "features split": (lambda i: jax.nn.one_hot(i, V).reshape(2, 3, 2, 3), set()),
    "sliced": (lambda i: jax.nn.one_hot(i, V)[:, 1:, 2:], {2}),
    "squeezed": (lambda i: jax.nn.one_hot(i, V)[:, 0], {1}),
    "multi-hot": (lambda i: jax.nn.one_hot(i, V).sum(1), set()),
    "smoothed": (lambda i: 0.9 * jax.nn.one_hot(i, V) + 0.1 / V, set()),
    "soft": (lambda i: jax.nn.softmax(jax.nn.one_hot(i, V)), set()),
    "compared with each other": (lambda i: i[:, :, None] == i[:, None, :], set()),
    "a range compared with what varies along it": (
        lambda i: jnp.arange(3)[None] == jnp.arange(6).reshape(2, 3),
        set(),
    ),
}


@pytest.mark.parametrize(("fn", "expected"), HOT.values(), ids=HOT.keys())
def test_which_axes_are_one_hot(fn, expected):
    assert axes(fn, IDS) == expected


@pytest.mark.parametrize("name", [n for n, (_, found) in HOT.items() if found])
def test_what_is_said_is_so(name):
    """The other way round: counted in the values."""
    fn, expected = HOT[name]
    for axis in expected:
        assert np.count_nonzero(np.asarray(fn(IDS)), axis=axis).max() <= 1


def roles(fn: Any, leaf: str = "w", **config: Any) -> list[str]:
    sites = tied_lora.trace(lambda p: fn(p["w"]), {"w": TABLE})
    return [s.role for s in sites]


PRODUCTS = {
    "one-hot along what is contracted": (lambda w: jax.nn.one_hot(IDS, V) @ w, "lookup"),
    "one-hot along another axis": (
        lambda w: jnp.repeat(jax.nn.one_hot(IDS, 5, axis=1)[..., None], V, 3) @ w,
        "projection",
    ),
    "one-hot along tokens": (lambda w: jax.nn.one_hot(jnp.arange(V), 3).T @ w, "projection"),
    "several features of one axis": (
        lambda w: jax.nn.one_hot(IDS, 2).reshape(2, V) @ w,
        "projection",
    ),
    "a bag of tokens": (lambda w: jax.nn.one_hot(IDS, V).sum(1) @ w, "projection"),
    "smoothed labels": (lambda w: (0.9 * jax.nn.one_hot(IDS, V) + 0.1 / V) @ w, "projection"),
}


@pytest.mark.parametrize(("fn", "role"), PRODUCTS.values(), ids=PRODUCTS.keys())
def test_the_role_of_a_product_with_a_leaf_of_which_nothing_is_known(fn, role):
    assert roles(fn) == [role]


@pytest.mark.parametrize("name", ["a bag of tokens", "smoothed labels"])
def test_weights_of_a_tables_rows_read_it_as_a_lookup(name):
    """A known table's rows that are summed over are looked up, with whatever weights."""
    fn, _ = PRODUCTS[name]
    adapted = wrapped({"embedding": TABLE}, ["embedding"])
    explained = check(lambda p: fn(p["embedding"]), adapted)
    assert [r.site.role for r in explained.reads] == ["lookup"]


def walk(carried: bool) -> Any:
    def fn(w: Any) -> Any:
        hot = jax.nn.one_hot(IDS, V)

        def body(carry: Any, x: Any) -> tuple[Any, Any]:
            return (carry * 0.5 + 0.1 if carried else carry), (carry if carried else x) @ w

        return jax.lax.scan(body, hot[0] if carried else jnp.zeros(()), hot)[1]

    return fn


def test_slices_that_a_scan_walks_over_are_one_hot():
    assert roles(walk(carried=False)) == ["lookup"]


def test_a_carry_that_changes_is_not_one_hot_any_more():
    assert roles(walk(carried=True)) == ["projection"]


class Policy(nn.Module):
    """A Dense fed with one-hot features, as they are or several side by side."""

    cells: int = 9

    @nn.compact
    def __call__(self, board):
        x = jax.nn.one_hot(board, 3)
        x = x.reshape(len(board), -1) if self.cells > 1 else x[:, 0]
        return nn.Dense(5, name="second")(nn.relu(nn.Dense(8, name="first")(x)))


@pytest.mark.parametrize("cells", [9, 1])
def test_a_dense_fed_with_one_hot_features_is_a_kernel(cells, standard_promotion):
    """Its factors start as a kernel's, all-linear takes it, and its input is dropped."""
    model, board = Policy(cells), (jnp.arange(4 * cells) % 3).reshape(4, cells)
    params = model.init(jax.random.key(0), board)["params"]
    sites = tied_lora.trace(model.apply, {"params": params}, board)
    config = tied_lora.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)
    adapted = tied_lora.wrap(params, config, sites=sites)
    assert set(adapted.adapters["lora"]) == {"first/kernel", "second/kernel"}
    assert not any(group.is_table for group in adapted.plan.adapted)
    assert not np.any(adapted.adapters["lora"]["first/kernel"]["lora_b"])
    run = tied_lora.adapt(model.apply)
    random = jax.tree.map(lambda x: x + 0.3, adapted.adapters)
    adapted = adapted.replace(adapters=random)
    dropped = run({"params": adapted.train(jax.random.key(1))}, board)
    assert not np.allclose(dropped, run({"params": adapted}, board))


def test_a_kernel_that_is_also_the_output_projection_is_a_table():
    params = {"embed": {"kernel": TABLE}}

    def fn(p: Any) -> Any:
        x = jax.nn.one_hot(IDS, V) @ p["embed"]["kernel"]
        return jnp.tanh(x) @ p["embed"]["kernel"].T

    sites = tied_lora.trace(fn, params)
    adapted = wrapped(params, ["embed"], sites=sites)
    assert adapted.plan.groups[0].is_table
    check(fn, adapted)
