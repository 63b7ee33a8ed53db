"""Adapters of parts of a fused leaf: stacked, scaled, combined, boxed, grown."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from flax_tied_lora import arithmetic, train
from tests.helpers.fused_model import PARAMS, X, fn, parts, plain, run
from tests.helpers.nnx_models import SharedVariable
from tests.helpers.small_models import wrapped


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
    with pytest.raises(TypeError, match=r"SharedVariable, an nnx\.Module; grow its state"):
        tied_lora.grow_vocabulary(SharedVariable(nnx.Rngs(0)), 20)
