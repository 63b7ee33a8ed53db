"""Which calls of a traced program get the rule registered for a custom derivative."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._interpreter import registry
from flax_tied_lora._interpreter.same_function import is_call_of
from tests.helpers.oracle import array, check, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
X = array(4, 6, seed=2)
LOW_RANK, MATERIALISED = ("dot_general", "low rank"), ("custom_vjp_call", "dense")


@pytest.fixture(autouse=True)
def _no_rules_left_behind(monkeypatch):
    monkeypatch.setattr(registry, "_CUSTOM", {})


def table(params):
    return params["embed"]["embedding"]


def served(fn, *args):
    return [(r.site.operation, r.served) for r in check(fn, TABLE, *args, on_dense="allow").reads]


def with_derivative(function, factor=1.0):
    """Returns a custom_vjp of (x, w), whose gradient is ``factor`` times what it should be."""
    made = jax.custom_vjp(function)

    def backward(kept, g):
        return jax.tree.map(lambda d: factor * d, jax.vjp(function, *kept)[1](g))

    made.defvjp(lambda x, w: (made(x, w), (x, w)), backward)
    return made


def plain_rule(function):
    return lambda context, equation, x, w: [context.evaluate(function, x, w)]


def loss(x, w):
    return jnp.sum(jax.nn.logsumexp(jax.nn.relu(x @ w.T), axis=0))


# fmt: off
sums, sines = (lambda x, w: jnp.sum(x @ w.T)), (lambda x, w: jnp.sum(jnp.sin(x @ w.T)))
# fmt: on


def test_two_functions_of_one_line():
    assert sums.__code__.co_firstlineno == sines.__code__.co_firstlineno
    assert sums.__name__ == sines.__name__
    first, second = with_derivative(sums), with_derivative(sines)
    tied_lora.register_rule(first, plain_rule(sums))
    assert served(lambda p, x: first(x, table(p)), X) == [LOW_RANK]
    assert served(lambda p, x: second(x, table(p)), X) == [MATERIALISED]
    tied_lora.register_rule(second, plain_rule(sines))
    assert served(lambda p, x: second(x, table(p)), X) == [LOW_RANK]
    assert served(lambda p, x: first(x, table(p)), X) == [LOW_RANK]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x, w: x @ w.T - 1.0, lambda x, w: x @ w.T - 2.0),  # a number
        (lambda x, w: x[0] - w[0], lambda x, w: w[0] - x[0]),  # the order of operands
        (lambda x, w: jnp.sum(x @ w[:4].T, 0), lambda x, w: jnp.sum(x @ w[:4].T, 1)),  # an axis
        (lambda x, w: [x[0], w[0]], lambda x, w: [w[0], x[0]]),  # the order of results
        (lambda x, w: jax.jit(jnp.sin)(x @ w.T), lambda x, w: jax.jit(jnp.cos)(x @ w.T)),
        (lambda x, w: x @ w.T, lambda x, w: (x @ w.T, x @ w.T)[0]),  # an operation more
    ],
)
def test_programs_that_differ_in_one_thing(one, other):
    function, twin = with_derivative(one), with_derivative(one)

    def called(function):
        (eqn,) = jax.make_jaxpr(lambda *xs: function(*xs))(X, array(8, 6, seed=3)).eqns
        return eqn

    assert is_call_of(called(function), twin)
    # With the same derivative, so that it is the program that tells them apart.
    twin = jax.custom_vjp(other)
    twin.defvjp(function.fwd, function.bwd)
    assert not is_call_of(called(function), twin)


def test_functions_that_differ_in_their_derivative_only():
    right, doubled = with_derivative(loss), with_derivative(loss, 2.0)
    tied_lora.register_rule(right, plain_rule(loss))
    assert served(lambda p, x: right(x, table(p)), X) == [LOW_RANK]
    assert served(lambda p, x: doubled(x, table(p)), X) == [MATERIALISED]


def test_custom_jvps_that_differ_in_their_derivative_only():
    def made(factor):
        function = jax.custom_jvp(sums)
        function.defjvp(
            lambda xs, ts: (function(*xs), factor * sums(xs[0], ts[1]) + sums(ts[0], xs[1]))
        )
        return function

    right, doubled = made(1.0), made(2.0)
    tied_lora.register_rule(right, plain_rule(sums))
    assert served(lambda p, x: right(x, table(p)), X) == [LOW_RANK]
    assert served(lambda p, x: doubled(x, table(p)), X) == [("custom_jvp_call", "dense")]


def test_partials():
    def scaled(scale, x, w):
        return scale * jnp.sum(jnp.sin(x @ w.T))

    twice, thrice = (functools.partial(scaled, factor) for factor in (2.0, 3.0))
    first, second = with_derivative(twice), with_derivative(thrice)
    tied_lora.register_rule(first, plain_rule(twice))
    assert served(lambda p, x: first(x, table(p)), X) == [LOW_RANK]
    assert served(lambda p, x: second(x, table(p)), X) == [MATERIALISED]


def test_integer_operands_and_literals():
    @jax.custom_vjp
    def picked(x, w, ids, scale):
        return scale * jnp.where(ids == 0, jnp.nan, x @ w.T)[:, 1:], ids

    def backward(kept, g):
        x, w, _, scale = kept
        grad = scale * jnp.pad(g[0], ((0, 0), (1, 0)))
        return grad @ w, grad.T @ x, None, None

    picked.defvjp(lambda *args: (picked(*args), args), backward)
    tied_lora.register_rule(
        picked,
        lambda context, equation, *operands: context.evaluate(
            lambda x, w, ids, scale: [scale * (x @ w.T)[:, 1:], ids], *operands
        ),
    )
    ids = jnp.arange(8)
    assert served(lambda p, x: picked(x, table(p), ids, 2.0), X) == [LOW_RANK]


def test_a_mapped_call_is_materialised():
    # The rule would sum over the wrong axis.
    function = with_derivative(loss)
    tied_lora.register_rule(function, plain_rule(loss))
    xs = array(2, 4, 6, seed=3)
    mapped = lambda p, xs: jax.vmap(lambda x: function(x, table(p)))(xs)  # noqa: E731
    assert served(mapped, xs) == [MATERIALISED]


@pytest.mark.parametrize("inside", ["jit", "checkpoint", "scan", "shard_map"])
def test_a_call_in_a_program_inside(inside):
    function = with_derivative(loss)
    tied_lora.register_rule(function, plain_rule(loss))

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


def test_a_function_of_more_than_arrays_is_not_recognised():
    of_a_dict = with_derivative(lambda x, tree: sums(x, tree["w"]))
    tied_lora.register_rule(of_a_dict, plain_rule(sums))
    assert served(lambda p, x: of_a_dict(x, {"w": table(p)}), X) == [MATERIALISED]


def test_arguments_that_are_not_traced_are_refused():
    function = jax.custom_vjp(lambda x, w, n: n * sums(x, w), nondiff_argnums=(2,))
    with pytest.raises(ValueError, match=r"'<lambda>' has nondiff_argnums=\(2,\).*custom_rule"):
        tied_lora.register_rule(function, plain_rule(sums))


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (lambda y: y, "returned a .*; expected a list of outputs of shapes"),
        (lambda y: [y, y], r"returned outputs of shapes \[\(\), \(\)\]; expected .* \[\(\)\]"),
        (lambda y: [y[None]], r"returned outputs of shapes \[\(1,\)\]; expected .* \[\(\)\]"),
    ],
)
def test_other_outputs_than_the_operation_has_are_refused(outputs, found):
    function = with_derivative(sums)

    @tied_lora.register_rule(function)
    def _(context, equation, x, w):
        return outputs(context.evaluate(sums, x, w))

    with pytest.raises(ValueError, match=f"the rule for 'custom_vjp_call' {found}"):
        tied_lora.adapt(lambda p, x: function(x, table(p)))(TABLE, X)
