"""Programs in the form that JAX is to take: checkpoints, scans, custom derivatives as objects."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import hijax

import flax_tied_lora as tied_lora
from flax_tied_lora._interpreter import registry
from flax_tied_lora._interpreter.jaxprs import (
    applied,
    body,
    operation_of,
    parameters_of,
    programs_inside,
)
from tests.helpers import small_models
from tests.helpers.oracle import array, check, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
X = array(4, 6, seed=2)
DIFFERENTIABLE = ("jax_remat3", "jax_custom_vjp3", "jax_custom_jvp3")
LOW_RANK = ("dot_general", "low rank")


@contextlib.contextmanager
def coming(*flags):
    """Has JAX trace in the form that it is to take, as far as that is not what it does anyway."""
    known = {flag: getattr(jax.config, flag) for flag in flags if hasattr(jax.config, flag)}
    for flag in known:
        jax.config.update(flag, True)
    try:
        yield
    finally:
        for flag, value in known.items():
            jax.config.update(flag, value)


@pytest.fixture(autouse=True)
def _no_rules_left_behind(monkeypatch):
    monkeypatch.setattr(registry, "_CUSTOM", {})
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def table(params):
    return params["embed"]["embedding"]


def served(explained):
    return [(r.site.operation, r.served) for r in explained.reads]


def product(w, x):
    return jnp.sin(x @ w.T)


by_hand, forward = jax.custom_vjp(product), jax.custom_jvp(product)
# Twice the derivative, so that a lost one shows.
by_hand.defvjp(
    lambda w, x: (product(w, x), (w, x)),
    lambda kept, g: jax.tree.map(lambda d: 2.0 * d, jax.vjp(product, *kept)[1](g)),
)
forward.defjvp(
    lambda xs, ts: (product(*xs), 2.0 * jax.jvp(product, xs, ts)[1]),
)


def walked(w, x):
    return lax.scan(lambda c, row: (c, product(w, row[None])), 0.0, x)[1]


FORMS = {
    "jax_remat3": ("checkpoint", jax.checkpoint(product), {"jaxpr", "policy", "prevent_cse"}),
    "jax_scan3": ("scan", walked, {"jaxpr", "length", "reverse", "unroll", "extensives"}),
    "jax_custom_vjp3": ("custom_vjp_call", by_hand, {"traced", "symbolic_zeros"}),
    "jax_custom_jvp3": ("custom_jvp_call", forward, {"traced", "symbolic_zeros"}),
}


@pytest.mark.parametrize("flag", FORMS)
def test_what_is_known_of_these_forms_is_what_they_are(flag):
    name, function, known = FORMS[flag]
    with coming(flag):
        eqns = body(jax.make_jaxpr(lambda *xs: function(*xs))(table(TABLE.params), X)).eqns
    found = {operation_of(eqn): eqn for eqn in eqns}
    where = f"jax {jax.__version__} with {flag}: _interpreter/jaxprs.py"
    assert name in found, f"{where} has no {name!r} for any of {[*found]} of {eqns}"
    eqn = found[name]
    assert isinstance(applied(eqn), hijax.HiPrim), f"{where} knows {eqn.params} by other names"
    missing = known - set(parameters_of(eqn))
    assert not missing, f"{where} expects {missing} among {[*parameters_of(eqn)]}"
    inside = {e.primitive.name for jaxpr in programs_inside(eqn) for e in body(jaxpr).eqns}
    assert "dot_general" in inside, f"{where} does not see into {parameters_of(eqn)}"


def test_a_name_for_checkpoints_is_known():
    with coming("jax_remat3"):
        (eqn,) = body(jax.make_jaxpr(lambda x: checkpoint_name(x, "kept"))(X)).eqns
    assert (operation_of(eqn), parameters_of(eqn)["name"]) == ("name", "kept")


# Checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": jax.checkpoint_policies.dots_saveable},
        {"policy": jax.checkpoint_policies.save_only_these_names("w")},
        {"prevent_cse": False},
        {"prevent_cse": (True, False)},
    ],
    ids=["all", "dots", "names", "no barriers", "a barrier for one"],
)
@pytest.mark.parametrize("inside", [False, True])
def test_checkpoints(options, inside):
    def named(w, x):
        return product(checkpoint_name(2.0 * w, "w"), x)

    def fn(params, x):
        return jnp.sum(jax.checkpoint(named, **options)(table(params), x))

    with coming(*DIFFERENTIABLE):
        explained = check(jax.grad(fn, argnums=1) if inside else fn, TABLE, X)
        assert set(served(explained)) == {LOW_RANK}
        found = jax.make_jaxpr(jax.grad(lambda x: tied_lora.adapt(fn)(TABLE, x)))(X)
    barriers = [e for e in body(found).eqns if e.primitive.name == "optimization_barrier"]
    assert bool(barriers) == (options.get("prevent_cse") is not False)


@pytest.mark.parametrize("flags", [(), DIFFERENTIABLE])
def test_policy_and_flags_of_a_checkpoint_are_kept(flags):
    policy = jax.checkpoint_policies.dots_saveable

    def fn(params, x):
        layer = jax.checkpoint(product, policy=policy, prevent_cse=(True, False))
        return layer(table(params), x)

    with coming(*flags):
        assert served(check(fn, TABLE, X)) == [LOW_RANK]
        traced = jax.make_jaxpr(lambda x: tied_lora.adapt(fn)(TABLE, x))(X)
    (eqn,) = [e for e in body(traced).eqns if operation_of(e) in ("checkpoint", "remat2")]
    kept = parameters_of(eqn)["prevent_cse"]
    assert parameters_of(eqn)["policy"] is policy
    assert (kept[-1], set(kept[:-1])) == (False, {True})  # the weight's parts, and the data


def nested(w, x):
    return jax.checkpoint(lambda w, x: jax.checkpoint(product)(w, x) @ w)(w, x)


@pytest.mark.parametrize(
    ("layer", "scope", "told"),
    [
        (jax.checkpoint(product), "model", True),
        (jax.jit(jax.checkpoint(product)), "model", True),
        (nested, "model", True),
        # Without a scope outside of the checkpoint the marks are those of a second derivative.
        (jax.checkpoint(product), "", False),
        (nested, "", False),
        (jax.jit(nested), "model", False),
    ],
)
def test_separate_adapters_of_a_function_differentiated_inside(layer, scope, told):
    def loss(params, x):
        w = table(params)
        with jax.named_scope(scope) if scope else contextlib.nullcontext():
            return jnp.sum(layer(w, w[jnp.array([3, 0, 3, 7])] + x))

    with coming(*DIFFERENTIABLE):
        with pytest.warns(tied_lora.WeightTyingWarning):
            adapted = small_models.wrapped(
                TABLE.params, ["embed", "lm_head"], sites=tied_lora.trace(loss, TABLE.params, X),
                ensure_weight_tying=False,
            )  # fmt: skip
        if not told:
            with pytest.raises(RuntimeError, match=r"'embed/embedding' has separate .*named_scope"):
                tied_lora.adapt(jax.grad(loss, argnums=1))(adapted, X)
            return
        within = tied_lora.adapt(jax.grad(loss, argnums=1))(adapted, X)
        around = jax.grad(lambda x: tied_lora.adapt(loss)(adapted, x))(X)
    np.testing.assert_allclose(within, around, rtol=1e-5, atol=1e-5)


# Custom derivatives


@pytest.mark.parametrize("function", [by_hand, forward])
@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint, jax.jit])
def test_registered_rules(function, around):
    with coming(*DIFFERENTIABLE):
        fn = lambda params, x: around(function)(table(params), x)  # noqa: E731
        assert [r.served for r in check(fn, TABLE, X, on_dense="allow").reads] == ["dense"]
        tied_lora.register_rule(
            function, lambda context, eqn, w, x: [context.evaluate(product, w, x)]
        )
        tied_lora_served = tied_lora.explain(fn, TABLE, X)
        assert served(tied_lora_served) == [LOW_RANK]
        other = jax.custom_vjp(lambda w, x: product(w, x))
        other.defvjp(by_hand.fwd, lambda kept, g: jax.vjp(product, *kept)[1](g))
        explained = check(lambda p, x: other(table(p), x), TABLE, X, on_dense="allow")
        assert served(explained) == [("custom_vjp_call", "dense")]
        twin = jax.custom_vjp(lambda w, x: 1.0 + product(w, x))
        twin.defvjp(by_hand.fwd, by_hand.bwd)
        explained = check(lambda p, x: twin(table(p), x), TABLE, X, on_dense="allow")
        assert served(explained) == [("custom_vjp_call", "dense")]


def test_a_custom_rule_and_the_loss():
    def loss(params, x):
        ruled = tied_lora.custom_rule(by_hand, lambda context, eqn, w, x: context.run(eqn, [w, x]))
        hidden = jax.checkpoint(lambda x: ruled(jnp.ones((6, 6)), jax.nn.relu(x)))(x)
        return jax.checkpoint(tied_lora.losses.linear_cross_entropy)(
            hidden, table(params), jnp.arange(4)
        )

    with coming(*DIFFERENTIABLE):
        assert served(check(loss, TABLE, X)) == [("linear_cross_entropy", "low rank")]


# Scans, of which JAX 0.12 itself has no gradients, and values only where nothing is compiled


@pytest.mark.parametrize("unroll", [1, 2])
def test_scans(unroll):
    stack = {"layers": {"kernel": array(3, 6, 6, seed=3)}}

    def fn(params, x):
        stacked = params["layers"]["kernel"]
        scan = functools.partial(lax.scan, unroll=unroll)
        x, (sums, kernels) = scan(lambda c, w: (product(w, c), (jnp.sum(c), w)), x, stacked)
        x, _ = scan(lambda c, _: (product(kernels[1], c), None), x, None, length=2)
        return x, sums

    with coming("jax_scan3"):
        adapted = wrapped(stack, ["layers"], sites=tied_lora.trace(fn, stack, X))
        explained = tied_lora.explain(fn, adapted, X)
        found = tied_lora.adapt(fn, on_dense="error")(adapted, X)
        expected = fn(tied_lora.merge(adapted), X)
    assert served(explained) == [LOW_RANK] * 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)
    assert jnp.any(found[1] != found[1][0])


def test_a_carried_weight_of_a_scan_is_materialised():
    def fn(params, x):
        return lax.fori_loop(0, 2, lambda _, c: (c[0], c[1] @ c[0].T @ c[0]), (table(params), x))[1]

    with coming("jax_scan3"):
        explained = tied_lora.explain(fn, TABLE, X)
        found = tied_lora.adapt(fn, on_dense="allow")(TABLE, X)
        expected = fn(tied_lora.merge(TABLE), X)
    assert [r.served for r in explained.reads] == ["dense"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
