"""Types that JAX was told of, and objects of one's own in a program."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import hijax

import flax_tied_lora as tied_lora
from flax_tied_lora._interpreter import registry
from tests.helpers.oracle import array, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
X = array(4, 6, seed=2)


@pytest.fixture(autouse=True)
def _no_rules_left_behind(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def table(params):
    return params["embed"]["embedding"]


def served(explained):
    return [(r.site.operation, r.served) for r in explained.reads]


def product(w, x):
    return jnp.sin(x @ w.T)


@dataclasses.dataclass(frozen=True)
class Pair:
    high: jax.Array
    low: jax.Array


@dataclasses.dataclass(frozen=True)
class PairType(hijax.HiType):
    shape: tuple[int, ...]

    def __hash__(self):
        return hash(self.shape)

    def __eq__(self, other):
        return type(other) is PairType and other.shape == self.shape

    def str_short(self, short_dtypes=False, **_):
        return f"Pair{self.shape}"

    def lo_ty(self):
        return [jax.core.ShapedArray(self.shape, jnp.dtype("float32"))] * 2

    def lower_val(self, hi_val):
        return [hi_val.high, hi_val.low]

    def raise_val(self, *lo_vals):
        return Pair(*lo_vals)


hijax.register_hitype(Pair, lambda pair: PairType(pair.high.shape))


class Split(hijax.HiPrim):
    def __init__(self, aval):
        self.in_avals, self.out_aval, self.params = (aval,), PairType(aval.shape), {}
        super().__init__()

    def expand(self, *args):
        high = jnp.round(args[0])
        return Pair(high, args[0] - high)


class Sum(hijax.HiPrim):
    def __init__(self, pair):
        self.in_avals, self.params = (pair,), {}
        self.out_aval = jax.core.ShapedArray(pair.shape, jnp.dtype("float32"))
        super().__init__()

    def expand(self, *args):
        return args[0].high + args[0].low


class Product(hijax.HiPrim):
    def __init__(self, w, x):
        self.in_avals, self.params = (w, x), {}
        self.out_aval = jax.core.ShapedArray((x.shape[0], w.shape[0]), x.dtype)
        super().__init__()

    def expand(self, *args):
        return product(*args)


def split(x):
    return Split(jax.typeof(x))(x)


def summed(pair):
    return Sum(jax.typeof(pair))(pair)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "fn",
    [
        lambda p, pair: jax.jit(lambda w, pair: product(w, summed(pair)))(table(p), pair),
        lambda p, pair: jax.jit(lambda pair, w: (pair, product(w, summed(pair))))(pair, table(p)),
        lambda p, pair: jax.jit(lambda w: split(product(w, summed(pair))))(table(p)),
        lambda p, pair: summed(jax.jit(lambda w: split(product(w, summed(pair))))(table(p))),
        lambda p, pair: split(product(table(p), summed(pair))),
        lambda p, pair: jax.checkpoint(lambda w, x: product(w, summed(x)))(table(p), pair),
    ],
)
def test_values_of_types_that_jax_was_told_of(fn, compiled):
    pair = Pair(jnp.round(X), X - jnp.round(X))
    adapted = tied_lora.adapt(fn, on_dense="error")
    found = (jax.jit(adapted) if compiled else adapted)(TABLE, pair)
    expected = fn(tied_lora.merge(TABLE), pair)
    found, expected = (
        jax.tree.map(lambda x: x.high + x.low if isinstance(x, Pair) else x, y)
        for y in (found, expected)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_an_object_of_ones_own_is_materialised_unless_it_has_a_rule():
    def fn(params, x):
        w = table(params)
        return Product(jax.typeof(w), jax.typeof(x))(w, x)

    name = f"{Product.__module__}.Product"
    assert served(tied_lora.explain(fn, TABLE, X)) == [(name, "dense")]
    with pytest.raises(tied_lora.DensifyError, match=name):
        tied_lora.adapt(fn, on_dense="error")(TABLE, X)
    tied_lora.register_rule(name, lambda context, eqn, w, x: [context.evaluate(product, w, x)])
    assert served(tied_lora.explain(fn, TABLE, X)) == [("dot_general", "low rank")]
