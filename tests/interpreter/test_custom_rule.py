"""`custom_rule`: functions that carry their rule with them."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.filtered import equinox, filter_custom_vjp
from tests.helpers.oracle import array, check, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
X = array(4, 6, seed=2)
LOW_RANK, MATERIALISED = ("dot_general", "low rank"), ("custom_vjp_call", "dense")


def table(params):
    return params["embed"]["embedding"]


def served(fn, *args):
    return [(r.site.operation, r.served) for r in check(fn, TABLE, *args, on_dense="allow").reads]


def loss(x, w):
    return jnp.sum(jax.nn.logsumexp(x @ w.T, axis=0))


def with_derivative(function, factor=1.0):
    """Returns a custom_vjp of (x, w), whose gradient is ``factor`` times what it should be."""
    made = jax.custom_vjp(function)

    def backward(kept, g):
        return jax.tree.map(lambda d: factor * d, jax.vjp(function, *kept)[1](g))

    made.defvjp(lambda x, w: (function(x, w), (x, w)), backward)
    return made


def by_plain(function):
    return lambda context, equation, *args, **kwargs: context.evaluate(function, *args, **kwargs)


def test_functions_of_one_definition_are_told_apart():
    rows = jnp.arange(1.0, 5.0)[:, None]

    def make(weight):
        function = lambda x, w: loss(weight * x, w)  # noqa: E731
        return function, with_derivative(function)

    (plain, ruled), (_, other) = make(rows), make(2.0 * rows)
    ruled = tied_lora.custom_rule(ruled, by_plain(plain))
    assert served(lambda p, x: ruled(x, table(p)), X) == [LOW_RANK]
    assert served(lambda p, x: other(x, table(p)), X) == [MATERIALISED]


def test_without_a_weight_it_is_the_function():
    doubled = with_derivative(loss, 2.0)
    ruled = tied_lora.custom_rule(doubled, by_plain(loss))
    w = array(8, 6, seed=3)
    xs = array(3, 4, 6, seed=4)
    for of in (
        lambda f: f(X, w),
        lambda f: jax.jit(f)(X, w),
        lambda f: jax.grad(f, argnums=(0, 1))(X, w),
        lambda f: jax.jit(jax.value_and_grad(jax.checkpoint(f)))(X, w),
        lambda f: jax.vmap(f, in_axes=(0, None))(xs, w),
        lambda f: jax.vmap(f, in_axes=(None, 1))(X, jnp.stack([w, 2 * w], axis=1)),
        lambda f: jax.vmap(jax.grad(f), in_axes=(0, None))(xs, w),
        lambda f: jax.grad(lambda x: jnp.sum(jax.vmap(f, in_axes=(0, None))(x, w)))(xs),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), of(ruled), of(doubled)
        )


def test_forward_mode_and_results_that_are_integers():
    @jax.custom_jvp
    def function(x, ids):
        return jnp.sum(jnp.sin(x)[ids]), ids + 1

    @function.defjvp
    def _(primals, tangents):
        (x, ids), (moved, none) = primals, tangents
        return function(x, ids), (3.0 * jnp.sum(moved[ids]), none)

    ruled = tied_lora.custom_rule(function, by_plain(loss))
    ids = jnp.array([1, 2])
    first = lambda x: jax.jvp(lambda x: ruled(x, ids), (x,), (jnp.ones_like(x),))  # noqa: E731
    (value, after), (tangent, none) = jax.jit(first)(X)
    assert (float(tangent), after.tolist(), none.dtype) == (36.0, [2, 3], jax.dtypes.float0)
    np.testing.assert_allclose(value, jnp.sum(jnp.sin(X)[ids]), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: ruled(x, ids)[0])(X)[1:3], 3.0)


def test_the_rule_has_the_arguments_of_the_function():
    seen = []

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def fused(x, tree, axis, scale):
        return scale * jnp.sum(jax.nn.logsumexp(x @ tree["w"].T, axis=axis))

    def plain(axis, scale, x, tree):
        return scale * jnp.sum(jax.nn.logsumexp(x @ tree["w"].T, axis=axis))

    def backward(axis, kept, g):
        x, tree, scale = kept
        dx, dtree = jax.grad(functools.partial(plain, axis, scale), argnums=(0, 1))(x, tree)
        return *jax.tree.map(lambda d: g * d, (dx, dtree)), None

    fused.defvjp(lambda x, tree, axis, s: (fused(x, tree, axis, s), (x, tree, s)), backward)

    def rule(context, equation, x, tree, axis, *, scale):
        seen.append((*tree, axis, scale))
        return context.evaluate(functools.partial(plain, axis, scale), x, tree)

    ruled = tied_lora.custom_rule(fused, rule)
    for axis in (0, 1):
        fn = lambda p, x, axis=axis: ruled(x, {"w": table(p)}, axis, scale=0.5)  # noqa: E731
        assert served(fn, X) == [LOW_RANK]
        assert set(seen) == {("w", axis, 0.5)}
        seen.clear()


@pytest.mark.parametrize("inside", ["jit", "checkpoint", "scan", "shard_map"])
def test_a_call_in_a_program_inside(inside):
    function = tied_lora.custom_rule(with_derivative(loss), by_plain(loss))

    def model(params, x):
        w = table(params)
        if inside == "scan":
            return jax.lax.scan(lambda c, row: (c + function(row[None], w), None), 0.0, x)[0]
        if inside == "shard_map":
            mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            return jax.shard_map(
                lambda x, w: function(x, jax.lax.pcast(w, "data", to="varying"))[None],
                mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"),
            )(x, w)  # fmt: skip
        return getattr(jax, inside)(function)(x, w)

    assert served(model, X) == [LOW_RANK]


def test_a_mapped_call_is_materialised():
    function = tied_lora.custom_rule(with_derivative(loss), by_plain(loss))
    xs = array(2, 4, 6, seed=3)
    mapped = lambda p, xs: jax.vmap(lambda x: function(x, table(p)))(xs)  # noqa: E731
    assert served(mapped, xs) == [MATERIALISED]


def test_a_weight_that_the_function_closes_over_is_materialised():
    def model(params, x):
        w = table(params)
        ruled = tied_lora.custom_rule(lambda x: loss(x, w), by_plain(lambda x: 0.0 * x[0, 0]))
        return ruled(x)

    assert served(model, X) == [("custom_rule", "dense")]


def test_a_rule_that_declines():
    ruled = tied_lora.custom_rule(with_derivative(loss), lambda *_: NotImplemented)
    assert served(lambda p, x: ruled(x, table(p)), X) == [("custom_rule", "dense")]


def test_effects_are_kept(capfd):
    def printing(x, w):
        jax.debug.print("the loss is computed")
        return loss(x, w)

    ruled = tied_lora.custom_rule(printing, by_plain(loss))
    jax.jit(lambda x, w: (ruled(x, w), 0.0)[1])(X, array(8, 6, seed=3))
    jax.effects_barrier()
    assert capfd.readouterr().out == "the loss is computed\n"


@pytest.mark.parametrize(("fn", "rule", "found"), [(3, len, "fn is a int"), (len, 3, "rule is a")])
def test_no_functions_are_refused(fn, rule, found):
    with pytest.raises(TypeError, match=f"custom_rule: {found}"):
        tied_lora.custom_rule(fn, rule)


def test_a_derivative_of_its_own_around_it():
    """The rule is the function's; without a rule that serves, the derivative is its author's."""
    ruled = with_derivative(tied_lora.custom_rule(loss, by_plain(loss)))
    assert served(lambda p, x: ruled(x, table(p)), X) == [LOW_RANK]
    assert served(lambda p, x: jax.jit(ruled)(jnp.tanh(x), table(p)), X) == [LOW_RANK]
    declined = tied_lora.custom_rule(loss, lambda *args: NotImplemented)
    assert served(lambda p, x: with_derivative(declined, 3.0)(x, table(p)), X) == [MATERIALISED]
    # What is around the function but its call alone has no rule.
    more = with_derivative(lambda x, w: 2.0 * tied_lora.custom_rule(loss, by_plain(loss))(x, w))
    assert served(lambda p, x: more(x, table(p)), X) == [MATERIALISED]


def test_a_function_that_takes_pytrees_and_statics():
    """As `equinox.filter_custom_vjp` makes one: each call is known, whatever it is called with."""
    made = filter_custom_vjp(lambda pred, scale: scale * loss(*pred))
    other = filter_custom_vjp(made.fn)
    for each in (made, other):
        each.defvjp(
            lambda pred, scale: (scale * loss(*pred), ()),
            lambda _, g, pred, scale: jax.vjp(lambda p: scale * loss(*p), pred)[1](g)[0],
        )
    seen = []

    def rule(context, equation, pred, scale):
        seen.append(scale)
        return [context.evaluate(lambda x, w: scale * loss(x, w), *pred)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "equinox", equinox)
        assert tied_lora.register_rule(made, rule) is rule
    for scale in (2.0, 3.0):
        assert served(lambda p, x, s=scale: made((x, table(p)), s), X) == [LOW_RANK]
    assert set(seen) == {2.0, 3.0}
    assert served(lambda p, x: other((x, table(p)), 2.0), X) == [MATERIALISED]
