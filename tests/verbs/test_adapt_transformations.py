"""adapt under and around jit, grad, vmap, checkpoint, scan, shard_map; leaks and compile counts."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS, TiedLM, init, wrapped

MODEL = TiedLM()
PARAMS = init(MODEL)
TARGETS = ["embed_tokens", "up"]
ADAPTED = wrapped(PARAMS, TARGETS)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def strict(fn):
    return tied_lora.adapt(fn, on_dense="error")


def loss(params, tokens):
    return jnp.mean(MODEL.apply({"params": params}, tokens) ** 2)


def adapters_loss(fn):
    return lambda adapters, tokens: fn(ADAPTED.replace(adapters=adapters), tokens)


def test_jit_and_grad():
    expected = jax.grad(adapters_loss(lambda a, t: loss(tied_lora.merge(a), t)))
    got = jax.grad(adapters_loss(strict(loss)))
    close(got(ADAPTED.adapters, TOKENS), expected(ADAPTED.adapters, TOKENS))
    jitted = jax.jit(jax.grad(adapters_loss(jax.jit(strict(loss)))))
    close(jitted(ADAPTED.adapters, TOKENS), expected(ADAPTED.adapters, TOKENS))


@pytest.mark.parametrize(
    "transform",
    [jax.checkpoint, lambda f: jax.vmap(f, in_axes=(None, 0)),
     lambda f: lambda a, t: jax.lax.scan(lambda c, x: (c, f(a, x)), 0.0, t)[1],
     lambda f: lambda a, t: jax.lax.map(lambda x: f(a, x), t)],
    ids=["checkpoint", "vmap", "scan", "map"],
)  # fmt: skip
def test_transformations_around_an_adapted_function(transform):
    tokens = jnp.asarray(TOKENS)
    merged = transform(lambda a, t: loss(tied_lora.merge(a), t))
    close(transform(strict(loss))(ADAPTED, tokens), merged(ADAPTED, tokens))
    total = lambda fn: lambda a: jnp.sum(adapters_loss(transform(fn))(a, tokens))  # noqa: E731
    expected = jax.grad(total(lambda a, t: loss(tied_lora.merge(a), t)))(ADAPTED.adapters)
    close(jax.grad(total(strict(loss)))(ADAPTED.adapters), expected)


def test_shard_map_around_an_adapted_function():
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    run = strict(lambda params, tokens: MODEL.apply({"params": params}, tokens))
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P("data")
    )
    close(jax.jit(mapped)(ADAPTED, jnp.asarray(TOKENS)), run(ADAPTED, TOKENS))


@pytest.mark.filterwarnings("ignore::flax_tied_lora.FrozenGradientWarning")
def test_stacked_adapters_equal_single_runs():
    several = [wrapped(PARAMS, TARGETS, seed=s, lora_alpha=a) for s, a in ((1, 2), (2, 2), (3, 2))]
    stacked = tied_lora.stack(several)
    run = strict(lambda a, tokens: MODEL.apply({"params": a}, tokens))
    many = jax.vmap(run, in_axes=(tied_lora.adapter_axes(stacked), None))(stacked, TOKENS)
    close(many, jnp.stack([run(a, TOKENS) for a in several]))
    each = jax.vmap(run, in_axes=(tied_lora.adapter_axes(stacked), 0))
    tokens = np.stack([TOKENS, TOKENS + 1, TOKENS + 2])
    close(
        each(stacked, tokens), jnp.stack([run(a, t) for a, t in zip(several, tokens, strict=True)])
    )
    grads = jax.vmap(jax.grad(lambda a: run(a, TOKENS).sum()), (tied_lora.adapter_axes(stacked),))
    with pytest.raises(TypeError, match=r"prng_key|grad requires"):
        grads(stacked.train(jax.random.key(0)))
    single = jax.grad(lambda a: run(a, TOKENS).sum())(several[1]).adapters
    close(jax.tree.map(lambda g: g[1], grads(stacked).adapters), single)


def test_no_tracer_leaks():
    with jax.checking_leaks():
        step = jax.jit(jax.grad(adapters_loss(strict(loss))))
        jax.block_until_ready(step(ADAPTED.adapters, TOKENS))


def test_debug_nans_under_jit():
    with jax.debug_nans(True):
        jax.block_until_ready(jax.jit(strict(loss))(ADAPTED, TOKENS))
        broken = jax.tree.map(lambda x: x.at[0].set(jnp.inf), ADAPTED.adapters)
        with pytest.raises(FloatingPointError, match="nan"):
            jax.jit(strict(loss))(ADAPTED.replace(adapters=broken), TOKENS)


# Compile counts


def counted(fn):
    """Returns a jitted adapted function, and the list of its tracings."""
    traced = []

    def body(adapted, *args):
        traced.append(1)
        return strict(fn)(adapted, *args)

    return jax.jit(body), traced


def test_switching_and_rescaling_recompile_nothing():
    run, traced = counted(loss)
    one, two = (wrapped(PARAMS, TARGETS, seed=s) for s in (1, 2))
    rescaled = dataclasses.replace(one, scaling={k: 3 * v for k, v in one.scaling.items()})
    results = [float(run(a, TOKENS)) for a in (one, two, rescaled, one)]
    assert len(traced) == 1
    assert results[0] == results[3]
    assert len(set(results)) == 3


def test_stacks_of_other_adapters_recompile_nothing():
    run, traced = counted(loss)
    stacks = [
        tied_lora.stack([wrapped(PARAMS, TARGETS, seed=s + i) for i in range(2)]) for s in (1, 4)
    ]
    many = jax.jit(jax.vmap(run, in_axes=(tied_lora.adapter_axes(stacks[0]), None)))
    assert len({np.asarray(many(s, TOKENS)).tobytes() for s in stacks}) == 2
    assert len(traced) == 1


def test_steps_with_other_dropout_keys_recompile_nothing():
    run, traced = counted(loss)
    adapted = wrapped(PARAMS, TARGETS, lora_dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    assert len({float(run(adapted.train(k), TOKENS)) for k in keys}) == 3
    assert len(traced) == 1
