"""merge and base: each delta once, ties and dtypes kept, and the params as they were."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig
from tests.helpers.small_models import LAYERS, TOKENS, StackedLM, TiedLM, init, wrapped

TABLE, HEAD = "embed_tokens/embedding", "lm_head/kernel"
PARAMS = init(TiedLM())
W = PARAMS["embed_tokens"]["embedding"]


def delta(adapted, key, spec="ar,rb->ab"):
    pair = adapted.adapters["lora"][key]
    product = np.einsum(spec, *(np.asarray(pair[n], np.float64) for n in ("lora_a", "lora_b")))
    return float(adapted.scaling[key]) * product


def tied_params():
    return {"embed_tokens": {"embedding": W}, "lm_head": {"kernel": W}, "tail": {"kernel": W.T}}


def tied(**options):
    ties = [(TABLE, "tail/kernel")]
    return wrapped(tied_params(), ["embed_tokens"], ties=ties, **options)


def test_merge_adds_each_delta_once():
    adapted = tied()
    merged = tied_lora.merge(adapted)
    expected = np.asarray(W, np.float64) + delta(adapted, TABLE)
    got = np.float64(merged["embed_tokens"]["embedding"])
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-6)
    assert merged["embed_tokens"]["embedding"] is merged["lm_head"]["kernel"]
    chex.assert_trees_all_equal(merged["tail"]["kernel"], merged["lm_head"]["kernel"].T)
    assert jax.tree.structure(merged) == jax.tree.structure(tied_params())


def test_merge_leaves_the_adapted_alone_and_can_be_wrapped_again():
    adapted = tied()
    before = jax.tree.leaves(adapted)
    merged = tied_lora.merge(adapted)
    assert all(a is b for a, b in zip(jax.tree.leaves(adapted), before, strict=True))
    again = tied_lora.wrap(merged, LoraConfig(r=2, target_modules=["embed_tokens"]), ties=[])
    assert [m.path for m in again.plan.adapted[0].members] == [TABLE, HEAD]


def test_merge_of_stacked_layers_and_heads():
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    adapted = wrapped(params, ["q_proj", "o_proj"], sites=sites)
    merged = tied_lora.merge(adapted)["layers"]["layer"]
    for name, spec in (("q_proj", "lar,lrhk->lahk"), ("o_proj", "lhkr,lrb->lhkb")):
        expected = delta(adapted, f"layers/layer/{name}/kernel", spec)
        expected += np.asarray(params["layers"]["layer"][name]["kernel"])
        assert expected.shape[0] == LAYERS
        chex.assert_trees_all_close(
            np.float64(merged[name]["kernel"]), expected, rtol=1e-5, atol=1e-6
        )


def test_merge_in_bfloat16_rounds_once():
    params = {"w": jnp.asarray(W, jnp.bfloat16)}
    adapted = wrapped(params, ["w"])
    exact = np.asarray(params["w"], np.float64) + delta(adapted, "w")
    merged = tied_lora.merge(adapted)["w"]
    assert merged.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(merged, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
    wide = tied_lora.merge(adapted, dtype=jnp.float32)["w"]
    assert wide.dtype == jnp.float32
    chex.assert_trees_all_close(np.float64(wide), exact, rtol=1e-6, atol=1e-6)


def test_merge_to_another_dtype_keeps_the_ties():
    merged = tied_lora.merge(tied(), dtype="bfloat16")
    assert merged["lm_head"]["kernel"] is merged["embed_tokens"]["embedding"]
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_merge_under_jit_and_without_deltas():
    adapted = tied()
    inside = jax.jit(tied_lora.merge)(adapted)
    chex.assert_trees_all_close(inside, tied_lora.merge(adapted), rtol=1e-6, atol=1e-6)
    fresh = tied_lora.wrap(PARAMS, LoraConfig(r=2, target_modules=["embed_tokens", "up"]))
    chex.assert_trees_all_equal(tied_lora.merge(fresh), PARAMS)


def test_merge_ignores_dropout():
    adapted = wrapped(PARAMS, ["up"], lora_dropout=0.5)
    training = adapted.train(jax.random.key(0))
    chex.assert_trees_all_equal(tied_lora.merge(training), tied_lora.merge(adapted))


def test_base_copies_nothing():
    params = tied_params()
    base = tied_lora.base(wrapped(params, ["embed_tokens"], ties=[(TABLE, "tail/kernel")]))
    assert base["embed_tokens"]["embedding"] is base["lm_head"]["kernel"] is W
    chex.assert_trees_all_equal(base, params)
    plain = tied_lora.base(wrapped(PARAMS, ["up"]))
    same = zip(jax.tree.leaves(plain), jax.tree.leaves(PARAMS), strict=True)
    assert all(a is b for a, b in same)


def test_base_of_shapes():
    shapes = jax.eval_shape(tied_params)
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    ties = [(TABLE, HEAD), (TABLE, "tail/kernel")]
    base = tied_lora.base(tied_lora.wrap(shapes, config, ties=ties))
    chex.assert_trees_all_equal_shapes_and_dtypes(base, shapes)


def test_a_weak_type_stays_weak():
    params = {"up": {"kernel": jnp.full((4, 4), 0.5)}, "head": {"kernel": jnp.full((4, 4), 0.5)}}
    assert params["up"]["kernel"].weak_type
    ties = [("up/kernel", "head/kernel", "transposed")]
    adapted = wrapped(params, ["up"], ties=ties)
    x = jnp.ones((2, 4), jnp.bfloat16)

    def f(p, x):
        return x @ p["up"]["kernel"] @ p["head"]["kernel"]

    merged = tied_lora.merge(adapted)
    assert all(leaf.weak_type for leaf in jax.tree.leaves(merged))
    assert jax.jit(tied_lora.merge)(adapted)["up"]["kernel"].weak_type
    assert f(params, x).dtype == f(merged, x).dtype == tied_lora.adapt(f)(adapted, x).dtype
    wide = tied_lora.merge(adapted, dtype=jnp.float32)
    assert not wide["up"]["kernel"].weak_type
