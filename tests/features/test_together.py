"""Parts, slots, grown vocabularies, quantised bases, NNX modules and model objects, combined."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from flax_tied_lora import arithmetic, train
from tests.helpers.nnx_models import TOKENS, VOCAB, SharedVariable
from tests.helpers.nnx_models import wrapped as wrapped_module
from tests.helpers.oracle import array
from tests.helpers.small_models import wrapped

PARAMS = {
    "embed_tokens": {"embedding": array(32, 16, seed=1)},
    "qkv": {"kernel": array(16, 48, seed=2)},
}
QKV = {"qkv": (-1, {"q": 24, "k": 16, "v": 8})}
X = np.array([[1, 2, 3], [4, 5, 6]], np.int32)


def fn(params, tokens):
    table = params["embed_tokens"]["embedding"]
    x = table[tokens]
    q, k, v = jnp.split(x @ params["qkv"]["kernel"], [24, 40], axis=-1)
    return (x + jnp.tanh(q[..., :16]) * k + jnp.tile(v, 2)) @ table.T


run = jax.jit(tied_lora.adapt(fn, on_dense="error"))
plain = jax.jit(fn)


def parts(*targets, **fields):
    return wrapped(PARAMS, list(targets), **{"parts": QKV, **fields})


def test_parts_of_other_spans_are_no_parts_of_one_stack():
    one = parts("qkv:q", parts={"qkv": (-1, ["q", "k"])})
    other = parts("qkv:q", parts={"qkv": (-1, ["k", "q"])})
    with pytest.raises(ValueError, match="stack: 'qkv/kernel:q' is another part of the leaf"):
        tied_lora.stack([one, other])
    with pytest.raises(ValueError, match="put: 'qkv/kernel:q' is another part of the leaf"):
        tied_lora.put(tied_lora.stack([one], capacity=2), 1, other)


def test_parts_whole_leaves_and_rows_in_one_batch():
    adapters = [
        parts("qkv:q", "qkv:v", rank_pattern={"qkv:v": 1}, trainable_token_indices=[1, 5]),
        wrapped(PARAMS, ["qkv", "embed_tokens"], seed=3),
        parts("qkv:k", seed=4),
    ]
    stacked = tied_lora.stack(adapters, capacity=4)
    each = jax.jit(tied_lora.per_example(tied_lora.adapt(fn)))
    found = each(tied_lora.select(stacked, [2, 0]), X)
    for row, slot in enumerate([2, 0]):
        expected = plain(tied_lora.merge(adapters[slot]), X)[row]
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-4)
    # A slot is merged by itself; and what is printed counts all of them.
    merged = tied_lora.merge(tied_lora.select(stacked, 1))
    np.testing.assert_allclose(plain(merged, X), plain(tied_lora.merge(adapters[1]), X), atol=1e-4)
    with pytest.raises(ValueError, match=r"one by one, merge\(tied_lora.select\(stacked, 0\)\)"):
        tied_lora.merge(tied_lora.select(stacked, [0, 1]))
    own = sum(g.size(a) for g, a in stacked.plan.adapters())
    assert f"trainable: {4 * own:,} of" in str(stacked)
    assert str(stacked).endswith(", in 4 slots")
    assert "slots" not in str(adapters[0])


def test_a_part_is_named_as_the_config_names_it():
    adapted = parts("qkv")
    scaled = arithmetic.scale(adapted, {"qkv:q": 2.0}).scaling
    assert {k: float(x / adapted.scaling[k]) for k, x in scaled.items()} == {
        "qkv/kernel:q": 2.0, "qkv/kernel:k": 1.0, "qkv/kernel:v": 1.0,
    }  # fmt: skip
    labels = train.labels_by(adapted, {"qkv:q": 1, "qkv": 2})["lora"]
    assert {key: own["lora_a"] for key, own in labels.items()} == {
        "qkv/kernel:q": 1, "qkv/kernel:k": 2, "qkv/kernel:v": 2,
    }  # fmt: skip


def test_the_config_of_a_sum_has_the_parts_of_all():
    both = arithmetic.combine([wrapped(PARAMS, ["embed_tokens"]), parts("qkv:q")], [1.0, 1.0])
    assert dict(both.plan.config.parts) == dict(parts("qkv:q").plan.config.parts)
    other = parts("qkv:k", parts={"qkv": (-1, ["q", "k", "v"])})
    with pytest.raises(ValueError, match="combine: parts of 'qkv' is "):
        arithmetic.combine([parts("qkv:q"), other], [1.0, 1.0])


def test_boxes_of_stacked_factors_name_the_axes_that_they_have():
    names = {"embed_tokens": ("vocab", "embed"), "qkv": ("embed", "heads")}
    boxed = {
        module: {leaf: nn.Partitioned(x, names[module]) for leaf, x in own.items()}
        for module, own in PARAMS.items()
    }
    adapted = wrapped(boxed, ["qkv"])
    stacked = tied_lora.put(tied_lora.stack([adapted], capacity=2), 1, adapted)
    pair = nn.get_partition_spec(stacked.adapters)["lora"]["qkv/kernel"]
    assert pair == {"lora_a": jax.P(None, "embed", None), "lora_b": jax.P(None, None, "heads")}
    boxed_fn = jax.jit(tied_lora.adapt(lambda p: fn(nn.meta.unbox(p), X)))
    expected = plain(nn.meta.unbox(tied_lora.merge(adapted)), X)
    np.testing.assert_allclose(boxed_fn(tied_lora.select(stacked, 1)), expected, atol=1e-4)
    mapped = jax.vmap(boxed_fn, in_axes=(tied_lora.adapter_axes(stacked),))(stacked)
    np.testing.assert_allclose(mapped[0], expected, atol=1e-4)


def test_a_table_in_parts_grows_where_the_parts_are_not_of_its_vocabulary():
    adapted = parts("embed_tokens:left", parts={"embed_tokens": (1, ["left", "right"])})
    grown, _ = tied_lora.grow_vocabulary(adapted, 40)
    np.testing.assert_allclose(run(grown, X)[..., :32], run(adapted, X), atol=1e-4)
    np.testing.assert_allclose(run(grown, X), plain(tied_lora.merge(grown), X), atol=1e-4)
    cut = parts("embed_tokens:tail", parts={"embed_tokens": (0, {"head": 8, "tail": 24})})
    with pytest.raises(ValueError, match="'embed_tokens/embedding:tail' is for a part of"):
        tied_lora.grow_vocabulary(cut, 40)


def test_what_does_not_grow_says_what_does():
    stored = tied_lora.quantize(parts("qkv:q"), "int8", exclude_modules=["qkv"])
    for params in (stored, stored.params):
        with pytest.raises(ValueError, match="'embed_tokens/embedding' is stored quantised"):
            tied_lora.grow_vocabulary(params, 40)
    with pytest.raises(TypeError, match="SharedVariable; grow its state"):
        tied_lora.grow_vocabulary(module(), 20)


@functools.cache
def module():
    return SharedVariable(nnx.Rngs(0))


@functools.cache
def two_modules():
    one = wrapped_module(module(), ["lm_head", "up"], seed=1)
    cut = {"up": (-1, {"a": 5, "b": 3})}
    return one, wrapped_module(module(), ["up:b"], seed=2, parts=cut)


def test_a_module_is_served_by_a_slot_and_switched_without_tracing_again():
    stacked = tied_lora.stack([tied_lora.nnx.adapted(m) for m in two_modules()])
    served = tied_lora.nnx.from_adapted(module(), tied_lora.select(stacked, 0))
    traces = []

    @nnx.jit
    def forward(served, tokens):
        traces.append(1)
        return served(tokens)

    for slot, expected in (*enumerate(two_modules()), (-1, module())):
        served.lora_slot.set_value(jnp.asarray(slot, jnp.int32))
        np.testing.assert_allclose(forward(served, TOKENS), expected(TOKENS), atol=1e-4)
    assert len(traces) == 1
    merged = tied_lora.nnx.merge(served)  # of no slot
    np.testing.assert_array_equal(merged.up.kernel[...], module().up.kernel[...])
    tied_lora.nnx.explain(served, TOKENS).assert_tied()


def test_a_module_with_an_adapter_for_each_example():
    stacked = tied_lora.stack([tied_lora.nnx.adapted(m) for m in two_modules()])

    @jax.jit
    @tied_lora.per_example
    def forward(adapted, tokens):
        return tied_lora.nnx.from_adapted(module(), adapted)(tokens)

    found = forward(tied_lora.select(stacked, [1, 0]), TOKENS)
    one, other = two_modules()
    np.testing.assert_allclose(found[:1], other(TOKENS[:1]), atol=1e-4)
    np.testing.assert_allclose(found[1:], one(TOKENS[1:]), atol=1e-4)


def test_an_adapted_module_grows():
    one, _ = two_modules()
    grown, vocabulary = tied_lora.grow_vocabulary(tied_lora.nnx.adapted(one), 15)
    assert dict(vocabulary.axes) == {"embed_tokens/embedding": 0, "lm_head/embedding": 0}
    larger = SharedVariable(nnx.Rngs(0))
    for each in (larger.embed_tokens, larger.lm_head):
        each.embedding.set_value(jnp.zeros((15, 8)))
    larger = tied_lora.nnx.from_adapted(larger, grown)
    np.testing.assert_allclose(larger(TOKENS)[..., :VOCAB], one(TOKENS), atol=1e-5)


class Scorer:
    """A model object, as transformers' Flax models are, with params of its own."""

    def __init__(self):
        self.params = PARAMS

    def __call__(self, tokens, params=None):
        return fn(self.params if params is None else params, tokens)


def test_a_model_object_with_slots():
    adapters = [parts("qkv:q", "embed_tokens"), parts("qkv:v", seed=3)]
    stacked = tied_lora.stack(adapters)
    model = tied_lora.AdaptedModel(Scorer(), tied_lora.select(stacked, 0))
    for slot, adapted in enumerate(adapters):
        expected = plain(tied_lora.merge(adapted), X)
        found = model.replace(tied_lora.select(stacked, slot))(X)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    (compiled,) = model._compiled.values()
    assert compiled._cache_size() == 1
    each = model.replace(tied_lora.select(stacked, [1, 0]))
    found = jax.jit(tied_lora.per_example(lambda model, tokens: model(tokens)))(each, X)
    np.testing.assert_allclose(found[0], plain(tied_lora.merge(adapters[1]), X)[0], atol=1e-4)
    np.testing.assert_allclose(found[1], plain(tied_lora.merge(adapters[0]), X)[1], atol=1e-4)


def test_a_model_object_with_separate_adapters_is_merged_untied():
    sites = tied_lora.trace(fn, PARAMS, X)
    with pytest.warns(tied_lora.WeightTyingWarning):
        adapted = wrapped(
            PARAMS, ["embed_tokens", "lm_head"], sites=sites, ensure_weight_tying=False
        )
    untie = {"lm_head": "lm_head/kernel"}
    found = tied_lora.AdaptedModel(Scorer(), adapted).merge(untie=untie)
    jax.tree.map(np.testing.assert_array_equal, found, tied_lora.merge(adapted, untie=untie))
