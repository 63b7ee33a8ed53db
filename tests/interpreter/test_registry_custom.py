"""Custom derivatives and primitives: kept, the weight added up, unless a rule is registered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import flax_tied_lora as tied_lora
from flax_tied_lora._interpreter import registry
from flax_tied_lora._interpreter.jaxprs import operation_of
from tests.helpers.oracle import array, check, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
X = array(3, 6, seed=2)


def table(params):
    return params["embed"]["embedding"]


def served(explained):
    return [(r.site.operation, r.served) for r in explained.reads]


@jax.custom_vjp
def doubled_loss(x, w):
    return jnp.sum((x @ w.T) ** 2)


def _forward(x, w):
    return doubled_loss(x, w), (x, w)


def _backward(kept, g):
    x, w = kept  # not the derivative: twice it, so that a lost rule shows
    y = 4.0 * g * (x @ w.T)
    return y @ w, y.T @ x


doubled_loss.defvjp(_forward, _backward)


@jax.custom_jvp
def odd(w):
    return 2.0 * w


odd.defjvp(lambda primals, tangents: (odd(*primals), 5.0 * tangents[0]))


def test_custom_vjp_is_kept_and_the_weight_added_up():
    def fn(params, x):
        with jax.named_scope("loss"):
            return doubled_loss(x, table(params))

    # The gradients of the oracle are the author's on both sides.
    explained = check(fn, TABLE, X, on_dense="allow")
    assert [(r.site.operation, r.served, r.site.scope) for r in explained.reads] == [
        ("custom_vjp_call", "dense", "loss")
    ]
    with pytest.warns(tied_lora.DensifyWarning, match="'embed/embedding'.*custom_vjp.*192 bytes"):
        tied_lora.adapt(fn)(TABLE, X)


def test_custom_jvp_is_kept_and_the_weight_added_up():
    explained = check(lambda p, x: x @ odd(table(p)).T, TABLE, X, on_dense="allow")
    assert served(explained) == [("custom_jvp_call", "dense")]


def test_custom_derivative_that_no_weight_enters():
    explained = check(lambda p, x: jax.nn.relu(odd(x)) @ table(p).T, TABLE, X)
    assert served(explained) == [("dot_general", "low rank")]


@jax.custom_vjp
def fused(x, w):
    return jnp.sum(jax.nn.logsumexp(x @ w.T, axis=1))


fused.defvjp(
    lambda x, w: (fused(x, w), (x, w)),
    lambda kept, g: jax.vjp(lambda x, w: jnp.sum(jax.nn.logsumexp(x @ w.T, axis=1)), *kept)[1](g),
)


@pytest.fixture(autouse=True)
def _no_rules_left_behind(monkeypatch):
    monkeypatch.setattr(registry, "_CUSTOM", {})
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def test_rule_for_a_custom_vjp():
    calls = []

    @tied_lora.register_rule(fused)
    def _(context, equation, x, w):
        calls.append(operation_of(equation))
        plain = lambda x, w: jnp.sum(jax.nn.logsumexp(x @ w.T, axis=1))  # noqa: E731
        return [context.evaluate(plain, x, w)]

    explained = check(lambda p, x: fused(x, table(p)), TABLE, X)
    assert served(explained) == [("dot_general", "low rank")]
    assert set(calls) == {"custom_vjp_call"}
    # Other functions are as they were.
    explained = check(lambda p, x: doubled_loss(x, table(p)), TABLE, X, on_dense="allow")
    assert served(explained) == [("custom_vjp_call", "dense")]


def test_rule_that_declines():
    tied_lora.register_rule(fused, lambda context, equation, x, w: NotImplemented)
    explained = check(lambda p, x: fused(x, table(p)), TABLE, X, on_dense="allow")
    assert served(explained) == [("custom_vjp_call", "dense")]


def test_rule_for_a_primitive():
    halved = Primitive("halved_product")
    halved.def_impl(lambda x, w: 0.5 * x @ w.T)
    halved.def_abstract_eval(lambda x, w: jax.core.ShapedArray((x.shape[0], w.shape[0]), x.dtype))
    mlir.register_lowering(halved, mlir.lower_fun(lambda x, w: 0.5 * x @ w.T, False))
    # Linear in each operand, so its derivative is made of products that JAX can differentiate.
    ad.defjvp(halved, lambda t, x, w: 0.5 * t @ w.T, lambda t, x, w: 0.5 * x @ t.T)

    def fn(params, x):
        return halved.bind(x, table(params))

    explained = check(fn, TABLE, X, on_dense="allow")
    assert served(explained) == [("halved_product", "dense")]

    @tied_lora.register_rule(halved)
    def _(context, equation, x, w):
        return [context.evaluate(lambda x, w: 0.5 * x @ w.T, x, w)]

    assert served(check(fn, TABLE, X)) == [("dot_general", "low rank")]


def test_rule_for_something_else():
    with pytest.raises(
        TypeError, match=r"register_rule: expected a jax\.extend\.core\.Primitive.* int"
    ):
        tied_lora.register_rule(3, lambda *args: NotImplemented)


def test_a_custom_function_that_closes_over_something_gets_no_rule():
    def make(scale: float) -> Any:
        @jax.custom_vjp
        def scaled(x: jax.Array) -> jax.Array:
            return scale * x

        scaled.defvjp(lambda x: (scale * x, None), lambda _, g: (scale * g,))
        return scaled

    with pytest.raises(ValueError, match="'scaled' closes over scale; functions that differ"):
        tied_lora.register_rule(make(2.0), lambda *_: NotImplemented)


def test_a_rule_by_the_primitives_name_is_for_functions_without_one(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    @tied_lora.register_rule("custom_vjp_call")
    def _(context: Any, eqn: Any, x: Any, w: Any) -> Any:
        return [context.evaluate(lambda x, w: jnp.sum((x @ w.T) ** 2), x, w)]

    explained = tied_lora.explain(lambda p, x: doubled_loss(x, table(p)), TABLE, X)
    assert served(explained) == [("dot_general", "low rank")]
