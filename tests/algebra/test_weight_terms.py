"""A new kind of term needs no change elsewhere: it is served by being added up, and reported."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_tied_lora._algebra.factor import RANK, Factor, pytree
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._algebra.term import Dense, LowRank, Term
from flax_tied_lora._algebra.weight import Origin, Weight
from flax_tied_lora._interpreter.context import Context
from flax_tied_lora._interpreter.evaluate import evaluate
from flax_tied_lora._interpreter.materialised import DensifyError
from flax_tied_lora._interpreter.sites import LeafInfo
from tests.helpers.compiling import as_shipped

V, D = 12, 6
TABLE = jax.random.normal(jax.random.key(0), (V, D))
EXTRA = jax.random.normal(jax.random.key(1), (V, D))
IDS = jnp.array([3, 0, 3, 11])
X = jax.random.normal(jax.random.key(2), (4, D))
INFO = {"embed": LeafInfo((0,), (), True)}


@pytree()
class Signs(Term):
    """A delta of +-1, stored as int8: a stand-in for a quantised term."""

    signs: Any

    def rearrange(self, move):
        moved = move(Factor(self.signs.astype(jnp.float32), tuple(range(self.signs.ndim))))
        return Signs(moved.ordered(range(moved.array.ndim)).array.astype(jnp.int8))

    def dense(self, shape, dtype):
        return self.signs.astype(dtype)

    def times(self, scale):
        array = self.dense(None, jnp.float32)
        return Dense.of(array).times(scale)


def low_rank(sites: SiteFilter | None = None) -> LowRank:
    a = jax.random.normal(jax.random.key(3), (V, 2))
    b = jax.random.normal(jax.random.key(4), (2, D))
    return LowRank(
        Factor(a, (0, RANK)), Factor(b, (RANK, 1)), jnp.float32(0.5), None, "embed", sites
    )


def weight(*terms: Term) -> Weight:
    return Weight(terms, None, (V, D), TABLE.dtype, (Origin("embed", ((0,), (1,))),))


def run(function: Any, symbolic: Weight, **options: Any) -> tuple[Any, Context]:
    context = Context(leaves=INFO, **options)
    closed = jax.make_jaxpr(function)(TABLE)
    return evaluate(context, closed, [symbolic])[0], context


USES = {
    "lookup": lambda w: w[IDS],
    "projection": lambda w: X @ w.T,
    "through jit": lambda w: jax.jit(lambda w: X @ w.T)(w),
    "sliced": lambda w: X @ w[2:7].T,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_term_that_no_rule_knows_is_added_up(use):
    signs = jnp.sign(EXTRA).astype(jnp.int8)
    found, context = run(use, weight(Dense.of(TABLE), Signs(signs), low_rank()), on_dense="allow")
    delta = low_rank().dense((V, D), jnp.float32)
    expected = use(TABLE + signs.astype(jnp.float32) + delta)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if use is not USES["lookup"]:  # what is picked by a lookup is small
        assert "dense" in [r.served for r in context.reads]
        with pytest.raises(DensifyError, match="'embed' is read by"):
            run(use, weight(Dense.of(TABLE), Signs(signs)), on_dense="error")


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_term_that_is_an_array_costs_nothing(use):
    found, context = run(use, weight(Dense.of(EXTRA, "copy"), low_rank()), on_dense="error")
    expected = use(EXTRA + low_rank().dense((V, D), jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert {(r.served, r.groups) for r in context.reads} == {("low rank", ("copy", "embed"))}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_copy_is_read_in_the_place_of_the_array(use):
    contexts = []

    def served(copy):
        found, context = run(use, weight(Dense.of(copy, "copy")), on_dense="error")
        contexts.append(context)
        return found

    # As shipped, XLA folds transpositions into products: so read, the weight is as it is stored.
    ours, plain = (as_shipped(jax.jit(fn).lower(EXTRA))(EXTRA) for fn in (served, use))
    np.testing.assert_array_equal(ours, plain)
    (context,) = contexts
    assert {(r.served, r.groups) for r in context.reads} == {("copy", ("copy",))}


@pytest.mark.parametrize("role", ["lookup", "projection"])
def test_a_term_is_there_for_its_call_sites_only(role):
    """Separate adapters on one leaf: a term for the lookups, or for the projections."""
    terms = weight(Dense.of(TABLE), low_rank(SiteFilter(role=role)))
    delta = low_rank().dense((V, D), jnp.float32)
    for name in ("lookup", "projection"):
        found, context = run(USES[name], terms, on_dense="error")
        expected = USES[name](TABLE + delta if name == role else TABLE)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert [r.served for r in context.reads] == ["low rank" if name == role else "plain"]


@pytest.mark.parametrize("scope", ["decoder", "encoder/shared"])
def test_a_term_is_there_for_its_scope_only(scope):
    @jax.jit
    def layer(w):
        with jax.named_scope("shared"):
            return X @ w.T

    def model(w):
        with jax.named_scope("encoder"):
            first = layer(w)
        with jax.named_scope("decoder"):
            return jnp.stack([first, layer(w)])

    found, _ = run(model, weight(Dense.of(TABLE), low_rank(SiteFilter(scope=scope))))
    delta = low_rank().dense((V, D), jnp.float32)
    with_delta, without = X @ (TABLE + delta).T, X @ TABLE.T
    expected = [without, with_delta] if scope == "decoder" else [with_delta, without]
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("axes", [(), (0,), (1,)], ids=["scalar", "rows", "columns"])
def test_a_scale_is_over_all_terms(use, axes):
    scale = Factor(jnp.linspace(0.5, 2.0, 12)[: [V, D][axes[0]] if axes else 1], axes)
    if not axes:
        scale = Factor(scale.array[0], ())
    symbolic = dataclasses.replace(weight(Dense.of(TABLE), low_rank()), scale=scale)
    found, _ = run(use, symbolic, on_dense="error")
    whole = TABLE + low_rank().dense((V, D), jnp.float32)
    expected = use(whole * scale.spread((0, 1), (V, D)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
