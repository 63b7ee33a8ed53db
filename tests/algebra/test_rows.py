"""Replaced rows (``trainable_token_indices``): at every way to read a table, and what they cost."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import oracle
from tests.helpers.oracle import array, check, numbers
from tests.helpers.small_models import TOKENS, TiedLM, init, wrapped
from tests.interpreter.rules.test_lookup import OTHERS, ROWS
from tests.interpreter.rules.test_lookup_out_of_bounds import BEYOND

V, D = 8, 6
REPLACED = (5, 0, 3)
IDS = numbers(2, 3, below=V, seed=5)
X = array(3, D, seed=2)
DTYPES = [jnp.float32, jnp.bfloat16]


def table(params):
    return params["embed"]["embedding"]


@functools.cache
def adapted(dtype=jnp.float32, targets=None):
    params = {"embed": {"embedding": array(V, D, seed=1, dtype=dtype)}}
    targets = None if targets is None else list(targets)
    return wrapped(params, targets, trainable_token_indices=list(REPLACED))


def served(explained):
    return {r.served for r in explained.reads}


# What they are


def test_rows_are_replaced_and_no_others():
    merged = table(tied_lora.merge(adapted()))
    frozen = table(tied_lora.base(adapted()))
    own = adapted().adapters["trainable_tokens"]["embed/embedding"]
    assert own.dtype == jnp.float32
    expected = np.array(frozen)
    expected[list(REPLACED)] = own
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6)


def test_rows_start_as_they_were():
    config = tied_lora.LoraConfig(trainable_token_indices=list(REPLACED))
    new = tied_lora.wrap(adapted().params, config)
    own = new.adapters["trainable_tokens"]["embed/embedding"]
    np.testing.assert_array_equal(own, table(new.params)[jnp.array(REPLACED)])
    np.testing.assert_array_equal(table(tied_lora.merge(new)), table(new.params))
    assert list(new.adapters["lora"]) == []


# Lookups


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ROWS.values(), ids=ROWS.keys())
def test_lookups(form, dtype):
    explained = check(lambda p: form(table(p)), adapted(dtype))
    assert served(explained) == {"rows"}
    assert explained.reads[0].groups == ("embed/embedding",)


@pytest.mark.parametrize("form", OTHERS.values(), ids=OTHERS.keys())
def test_lookups_along_other_axes(form):
    assert served(check(lambda p: form(table(p)), adapted())) == {"rows"}


@pytest.mark.parametrize("mode", ["clip", "wrap", "fill"])
@pytest.mark.parametrize("axis", [0, 1])
def test_lookups_out_of_bounds(mode, axis):
    check(lambda p: jnp.take(table(p), BEYOND, axis=axis, mode=mode), adapted())


def test_out_of_bounds_along_an_axis_that_the_rows_do_not_vary_along():
    def fn(params):
        several = jnp.broadcast_to(table(params)[None], (3, V, D))
        return several.at[jnp.array([0, 5])].get(mode="fill", fill_value=7.0)

    check(fn, adapted(), on_dense="allow")


@pytest.mark.parametrize("fill", [None, 0, -2.5])
def test_fill_values_stay(fill):
    def fn(params):
        w = table(params)
        scaled = (w, -3.0 * w, w * jnp.arange(1.0, 9.0)[:, None], w * jnp.arange(1.0, 7.0)[None])
        return [jnp.take(s, BEYOND, axis=0, mode="fill", fill_value=fill) for s in scaled]

    check(fn, adapted())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_lookups(dtype):
    def fn(params):
        w = table(params)
        hot = jax.nn.one_hot(IDS, V, dtype=w.dtype)
        return hot @ w, jnp.einsum("vd,btv->btd", w, hot)

    explained = check(fn, adapted(dtype))
    assert {(r.site.role, r.served) for r in explained.reads} == {("lookup", "rows")}


def test_dynamic_slices():
    def fn(params, i):
        w = table(params)
        return [
            lax.dynamic_slice(w, (i, 0), (3, D)), lax.dynamic_slice(w, (i, i), (2, 2)),
            lax.dynamic_slice_in_dim(w, i, 2, axis=1),
            lax.dynamic_index_in_dim(w, i, keepdims=False),
        ]  # fmt: skip

    for start in (0, 4, 7, 30, -2):
        check(fn, adapted(), jnp.int32(start))


# Projections


PROJECTIONS = {
    "x @ W.T": lambda w, x: x @ w.T,
    "W @ x.T": lambda w, x: w @ x.T,
    "einsum": lambda w, x: jnp.einsum("td,vd->vt", x, w),
    "dot_general": lambda w, x: lax.dot_general(x, w, (((1,), (1,)), ((), ()))),
    "one vector": lambda w, x: w @ x[0],
    "y @ W": lambda w, x: (x @ jnp.ones((D, V), x.dtype)) @ w,
    "W.T @ y": lambda w, x: w.T @ jnp.ones((V, 2), x.dtype),
    "more axes": lambda w, x: jnp.stack([x, 2 * x]) @ w.T,
    "vmap over data": lambda w, x: jax.vmap(lambda row: w @ row)(x),
    "one token's logit": lambda w, x: x @ w[3],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", PROJECTIONS.values(), ids=PROJECTIONS.keys())
def test_projections(form, dtype):
    explained = check(lambda p, x: form(table(p), x), adapted(dtype), X.astype(dtype))
    assert served(explained) == {"rows"}


def test_a_projection_accumulates_in_float32():
    """Of bfloat16 logits with rows in float32 the error is that of one rounding."""

    def fn(params, x):
        return jnp.dot(x, table(params).T, preferred_element_type=jnp.float32)

    assert served(check(fn, adapted(jnp.bfloat16), X.astype(jnp.bfloat16))) == {"rows"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_members(dtype):
    w = array(V, D, seed=1, dtype=dtype)
    params = {"embed": {"embedding": w}, "head": {"kernel": w.T}}
    tied = wrapped(params, None, trainable_token_indices=list(REPLACED),
                   ties=[("embed/embedding", "head/kernel")])  # fmt: skip

    def fn(params, x):
        return params["embed"]["embedding"][IDS], x @ params["head"]["kernel"]

    explained = check(fn, tied, X.astype(dtype))
    assert [(r.site.leaf, r.served) for r in explained.reads] == [
        ("embed/embedding", "rows"), ("head/kernel", "rows")
    ]  # fmt: skip


def test_rows_of_an_output_projection_are_its_columns():
    params = {"head": {"kernel": array(D, V, seed=1)}}
    own = wrapped(params, None, trainable_token_indices={"head": list(REPLACED)})
    assert own.adapters["trainable_tokens"]["head/kernel"].shape == (3, D)
    assert served(check(lambda p, x: x @ p["head"]["kernel"], own, X)) == {"rows"}


# With LoRA


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_lora_on_the_same_table(dtype):
    both = adapted(dtype, ("embed",))

    def fn(params, x):
        w = table(params)
        return w[IDS], x @ w.T, (2.0 * w)[IDS], x @ w[2:7].T

    explained = check(fn, both, X.astype(dtype))
    assert served(explained) == {"low rank"}
    frozen, own = table(both.params), both.adapters["trainable_tokens"]["embed/embedding"]
    merged = tied_lora.merge(both, dtype=jnp.float32)
    lora = both.adapters["lora"]["embed/embedding"]
    delta = 1.5 * np.asarray(lora["lora_a"]) @ np.asarray(lora["lora_b"])
    expected = np.array(frozen, np.float32)
    expected[list(REPLACED)] = own
    np.testing.assert_allclose(
        table(merged),
        expected + delta,
        rtol=1e-2 if dtype != DTYPES[0] else 1e-5,
        atol=1e-2 if dtype != DTYPES[0] else 1e-5,
    )


def test_in_a_model():
    model = TiedLM()
    params = init(model)
    both = wrapped(params, ["up"], trainable_token_indices=[1, 4, 11])

    def fn(params, tokens):
        return model.apply({"params": params}, tokens)

    explained = check(fn, both, jnp.asarray(TOKENS))
    assert [(r.site.operation, r.served) for r in explained.reads] == [
        ("gather", "rows"), ("dot_general", "low rank"), ("dot_general", "rows")
    ]  # fmt: skip


# On the way to an operation


WAYS = {
    "sliced": lambda w: w[2:7],
    "strided": lambda w: w[1::2],
    "reversed": lambda w: w[::-1],
    "columns cut": lambda w: w[:, 1:4],
    "padded": lambda w: jnp.pad(w, ((1, 3), (0, 0))),
    "padded with ones": lambda w: jnp.pad(w, ((0, 1), (2, 0)), constant_values=1),
    "concatenated": lambda w: jnp.concatenate([jnp.ones((2, D), w.dtype), w]),
    "with itself": lambda w: jnp.concatenate([w, w]),
    "with a part of itself": lambda w: jnp.concatenate([w[3:], w[:4]]),
    "stacked and taken": lambda w: jnp.stack([w, 2 * w])[1],
    "reshaped": lambda w: w.reshape(V, 2, 3).reshape(V, D),
    "scaled": lambda w: 2.5 * w,
    "rows scaled": lambda w: w * jnp.arange(1.0, V + 1).astype(w.dtype)[:, None],
    "columns scaled": lambda w: w * jnp.arange(1.0, D + 1).astype(w.dtype)[None],
    "negative": lambda w: -w,
    "cast": lambda w: w.astype(jnp.float32).astype(w.dtype),
    "twice": lambda w: w + w,
    "half of the rows": lambda w: jnp.split(w, 2)[1],
    "turned twice": lambda w: w.T.T,
    "tiled": lambda w: jnp.tile(w, (2, 1)),
    "rolled": lambda w: jnp.roll(w, 3, axis=0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_on_the_way(way, dtype):
    def fn(params, x):
        w = way(table(params))
        width = w.shape[1]
        return w[jnp.array([1, 2, 1, 0])], x[:, :1] @ jnp.ones((1, width), x.dtype) @ w.T

    dense = way is WAYS["tiled"]
    explained = check(fn, adapted(dtype), X.astype(dtype), on_dense="allow" if dense else "error")
    assert served(explained) == ({"rows", "dense"} if dense else {"rows"})


def test_columns_picked_twice_of_an_output_projection():
    """A sampled softmax: the same column may be there more than once."""
    params = {"head": {"kernel": array(D, V, seed=1)}}
    own = wrapped(params, None, trainable_token_indices={"head": list(REPLACED)})

    def fn(params, x):
        return x @ params["head"]["kernel"][:, jnp.array([5, 5, 1, 0, 5])]

    check(fn, own, X, on_dense="allow")


def test_parts_of_no_rows_after_a_scale():
    """As a roll by no step makes of a table that was scaled row by row."""
    params = {"embed": {"embedding": array(6, 4, seed=1)}}
    adapted = oracle.wrapped(params, ["embed"], kind="rows")

    def fn(params, scale):
        w = params["embed"]["embedding"] / (2.0 + jnp.abs(scale))
        return (w + jnp.roll(w, 0, 0) / 4)[jnp.array([0, 1, 5])]

    check(fn, adapted, array(6, 1, seed=2), on_dense="allow")
