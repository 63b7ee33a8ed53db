"""Separate adapters of one array (``ensure_weight_tying=False``): as a model with several leaves.

The oracle is the model in which each part has a leaf, on what ``merge(untie=...)`` returns.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array
from tests.helpers.small_models import wrapped

# Frozen params are differentiated on purpose, to compare their gradients too.
pytestmark = pytest.mark.filterwarnings("ignore::flax_tied_lora.FrozenGradientWarning")

TABLE, HEAD = "embed_tokens/embedding", "lm_head/kernel"
V, D = 12, 8
IDS = jnp.array([3, 0, 3, 11])
X = array(4, D, seed=2)
W = array(V, D, seed=1)
DTYPES = [jnp.float32, jnp.bfloat16]


def body(table, head, x):
    """Of a table and an output projection [D, V]."""
    return jnp.tanh((table[IDS] + x) @ head)


def tied(params, x):
    w = params["embed_tokens"]["embedding"]
    return body(w, w.T, x)


def untied(params, x):
    return body(params["embed_tokens"]["embedding"], params["lm_head"]["kernel"], x)


def separate(params, targets, fn, **options):
    """Returns params with separate adapters, their values random; the warning is checked."""
    options = {"ensure_weight_tying": False, **options}
    sites = tied_lora.trace(fn, params, X.astype(jax.tree.leaves(params)[0].dtype))
    with pytest.warns(tied_lora.WeightTyingWarning, match=f"False, and '{TABLE}' is tied"):
        return wrapped(params, targets, sites=sites, **options)


def one_leaf(targets, dtype=jnp.float32, **options):
    return separate({"embed_tokens": {"embedding": W.astype(dtype)}}, targets, tied, **options)


def two_leaves(targets, dtype=jnp.float32, **options):
    w = W.astype(dtype)
    params = {"embed_tokens": {"embedding": w}, "lm_head": {"kernel": w.T}}
    return separate(params, targets, untied, ties=[(TABLE, HEAD)], **options)


def equal(fn, reference, own, untie, x=X):
    """Checks values and gradients of the adapted function against the model with several leaves."""

    def ours(own, x):
        return tied_lora.adapt(fn, on_dense="error")(own, x)

    def theirs(own, x):
        return reference(tied_lora.merge(own, untie=untie), x)

    def outcome(f):
        def loss(own, x):
            out = f(own, x)
            weights = jax.tree.map(lambda y: array(*y.shape, seed=9), out)
            sums = [jnp.sum(y.astype(jnp.float32) * w) for y, w in zip(
                jax.tree.leaves(out), jax.tree.leaves(weights), strict=True)]  # fmt: skip
            return jnp.stack(sums).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(own, x)

    loose = any(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(own.params))
    found, expected = outcome(ours), outcome(theirs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        want = np.float64(want)
        size = max(1.0, np.abs(want).max())
        limit = 0.06 if loose else 2e-5
        np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=limit * size)


KINDS = {
    "lora on both": (
        {"targets": ["embed_tokens", "lm_head"]}, {"lora": ["embed_tokens", "lm_head"]},
    ),
    "lora on lookups": ({"targets": ["embed_tokens"]}, {"lora": ["embed_tokens"]}),
    "lora on projections": ({"targets": ["lm_head"]}, {"lora": ["lm_head"]}),
    "copies of both": (
        {"targets": None, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "copy for projections": (
        {"targets": None, "modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]},
    ),
    "lora on lookups, copy for projections": (
        {"targets": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        {"lora": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leaves", [one_leaf, two_leaves])
@pytest.mark.parametrize("kind", KINDS)
def test_as_a_model_with_two_leaves(kind, leaves, dtype):
    options, names = KINDS[kind]
    own = leaves(dtype=dtype, **options)
    keys = {k: set(v) for k, v in own.adapters.items() if v}
    assert keys == {k: {f"{TABLE}:{n}" for n in v} for k, v in names.items()}
    fn = tied if leaves is one_leaf else untied
    equal(fn, untied, own, {"lm_head": HEAD}, X.astype(dtype))
    reads = {r.site.role: r.groups for r in tied_lora.explain(fn, own, X.astype(dtype)).reads}
    for role, name in (("lookup", "embed_tokens"), ("projection", "lm_head")):
        there = any(name in v for v in names.values())
        assert reads[role] == ((f"{TABLE}:{name}",) if there else ())


@pytest.mark.parametrize("leaves", [one_leaf, two_leaves])
def test_different_rows(leaves):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tied_lora.WeightTyingWarning)
        tokens = {"embed_tokens": [3, 0], "lm_head": [7, 11, 3]}
        params = tied_lora.base(leaves(["embed_tokens"]))
        fn = tied if leaves is one_leaf else untied
        own = wrapped(
            params, None, trainable_token_indices=tokens, ensure_weight_tying=False,
            sites=tied_lora.trace(fn, params, X),
            ties="auto" if leaves is one_leaf else [(TABLE, HEAD)],
        )  # fmt: skip
    shapes = {k: v.shape for k, v in own.adapters["trainable_tokens"].items()}
    assert shapes == {f"{TABLE}:embed_tokens": (2, D), f"{TABLE}:lm_head": (3, D)}
    equal(fn, untied, own, {"lm_head": HEAD})


# Inside programs

PROGRAMS = {
    "checkpoint in a scan": lambda f: lambda t, h, x: jax.grad(
        lambda x: jnp.sum(
            lax.scan(lambda c, _: (2 * c, jax.checkpoint(f)(t, h, c)), x, None, length=2)[1]
        )
    )(x),
    "checkpoint in a checkpoint": lambda f: lambda t, h, x: jax.grad(
        lambda x: jnp.sum(jax.checkpoint(lambda x: jax.checkpoint(f)(t, h, x) @ t)(x))
    )(x),
    "checkpointed second order": lambda f: lambda t, h, x: jax.grad(
        lambda x: jnp.sum(jax.checkpoint(jax.grad(lambda x: jnp.sum(f(t, h, x))))(x) ** 2)
    )(x),
    "cond": lambda f: lambda t, h, x: jax.grad(
        lambda x: jnp.sum(lax.cond(x[0, 0] > 0, f, lambda t, h, x: 2 * f(t, h, x), t, h, x))
    )(x),
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda t, h, x: lax.scan(lambda c, _: (c, f(t, h, c)), x, None, length=2)[1],
    "gradient of data": lambda f: lambda t, h, x: jax.grad(lambda x: jnp.sum(f(t, h, x)))(x),
    "checkpointed gradient": lambda f: lambda t, h, x: jax.grad(
        lambda x: jnp.sum(jax.checkpoint(f)(t, h, x))
    )(x),
    "jitted gradient": lambda f: lambda t, h, x: jax.grad(
        lambda x: jnp.sum(jax.jit(f)(t, h, x))
    )(x),
    "forward mode": lambda f: lambda t, h, x: jax.jvp(lambda x: f(t, h, x), (x,), (x,)),
    "second order": lambda f: lambda t, h, x: jax.grad(
        lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(f(t, h, x)))(x) ** 2)
    )(x),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["lora on both", "lora on projections", "lora on lookups, copy for projections"]
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, kind):
    run = PROGRAMS[program](body)

    def fn(params, x):
        w = params["embed_tokens"]["embedding"]
        return run(w, w.T, x)

    def reference(params, x):
        return run(params["embed_tokens"]["embedding"], params["lm_head"]["kernel"], x)

    # In float64: how a gradient's sums are ordered, and so rounded, differs between XLA's releases.
    with jax.enable_x64(True):
        own = one_leaf(**KINDS[kind][0], dtype=jnp.float64)
        equal(fn, reference, own, {"lm_head": HEAD}, X.astype(jnp.float64))


def test_one_hot_lookups_differentiated_before_they_are_adapted():
    def model(table, head, x):
        hot = jax.nn.one_hot(IDS, V, dtype=x.dtype)
        return jnp.tanh((hot @ table + x) @ head)

    def fn(params, x):
        w = params["embed_tokens"]["embedding"]
        return jax.grad(lambda x: jnp.sum(model(w, w.T, x)))(x), model(w, w.T, x)

    def reference(params, x):
        t, h = params["embed_tokens"]["embedding"], params["lm_head"]["kernel"]
        return jax.grad(lambda x: jnp.sum(model(t, h, x)))(x), model(t, h, x)

    equal(fn, reference, one_leaf(["embed_tokens", "lm_head"]), {"lm_head": HEAD})


# Scopes


def stacks(shared, decoder, head, x):
    """An encoder and a decoder that look up in one table, as T5's do."""
    with jax.named_scope("encoder"), jax.named_scope("shared"):
        h = shared[IDS] + x
    with jax.named_scope("decoder"), jax.named_scope("shared"):
        h = jnp.tanh(h) + decoder[IDS[::-1]]
    with jax.named_scope("lm_head"):
        return h @ head


def test_scopes():
    def fn(params, x):
        w = params["embed_tokens"]["embedding"]
        return stacks(w, w, w.T, x)

    def reference(params, x):
        w = params["embed_tokens"]["embedding"]
        return stacks(params["encoder"]["embedding"], w, w.T, x)

    params = {"embed_tokens": {"embedding": W}}
    own = separate(params, ["encoder/shared"], fn)
    assert list(own.adapters["lora"]) == [f"{TABLE}:encoder/shared"]
    equal(fn, reference, own, {"encoder/shared": "encoder/embedding"})
    both = separate(params, ["encoder/shared", "decoder/shared"], fn)

    def all_apart(params, x):
        e, d = params["encoder"]["embedding"], params["decoder"]["embedding"]
        return stacks(e, d, params["embed_tokens"]["embedding"].T, x)

    untie = {f"{n}/shared": f"{n}/embedding" for n in ("encoder", "decoder")}
    equal(fn, all_apart, both, untie)
    with pytest.raises(ValueError, match="has separate adapters for 'encoder/shared', 'decoder/sh"):
        tied_lora.merge(both, untie={"encoder/shared": "encoder/embedding"})


def test_a_leaf_of_neither_role_is_refused():
    def fn(params, x):
        return tied(params, x), jnp.sum(jnp.square(params["embed_tokens"]["embedding"]))

    with pytest.raises(ValueError, match=f"'{TABLE}' has separate adapters .*neither.*Tie them"):
        tied_lora.adapt(fn)(one_leaf(["lm_head"]), X)


@pytest.mark.filterwarnings("ignore::flax_tied_lora.WeightTyingWarning")
def test_dora_is_refused():
    params = {"embed_tokens": {"embedding": W}}
    sites = tied_lora.trace(tied, params, X)
    config = tied_lora.LoraConfig(
        r=2, target_modules=["lm_head"], use_dora=True, ensure_weight_tying=False
    )
    with pytest.raises(ValueError, match=r"use_dora scales all of .*for 'lm_head' only"):
        tied_lora.wrap(params, config, sites=sites)
