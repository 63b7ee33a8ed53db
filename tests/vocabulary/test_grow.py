"""`grow_vocabulary` on params: which leaves grow, what stays, what is refused."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array

V, D, F = 12, 8, 20
TABLE = "embed_tokens/embedding"


def params(**more: Any) -> dict[str, Any]:
    return {
        "embed_tokens": {"embedding": array(V, D)},
        "up": {"kernel": array(D, F, seed=1), "bias": array(F, seed=2)},
        **more,
    }


def test_a_tied_table():
    old = params()
    new, vocabulary = tied_lora.grow_vocabulary(old, V + 3, pad_to_multiple_of=8)
    assert (vocabulary.n_tokens, vocabulary.size) == (15, 16)
    assert (vocabulary.old_tokens, vocabulary.old_size) == (12, 12)
    assert vocabulary.axes == {TABLE: 0}
    assert list(vocabulary.new_tokens) == [12, 13, 14]
    assert list(vocabulary.padding) == [15]
    table = new["embed_tokens"]["embedding"]
    assert table.shape == (16, D)
    np.testing.assert_array_equal(table[:V], old["embed_tokens"]["embedding"])
    assert new["up"] is not old["up"]
    assert new["up"]["kernel"] is old["up"]["kernel"]
    assert old["embed_tokens"]["embedding"].shape == (V, D)
    config = tied_lora.LoraConfig(trainable_token_indices=vocabulary.new_tokens)
    assert config.trainable_token_indices == (12, 13, 14)


def test_ties_stay():
    """The same array stays the same array, a declared transposed one stays the transpose."""
    table = array(V, D)
    old = params(decoder={"embed_tokens": {"embedding": table}}, lm_head={"kernel": table.T})
    old["embed_tokens"]["embedding"] = table
    ties = [(TABLE, "lm_head/kernel")]
    new, vocabulary = tied_lora.grow_vocabulary(old, 14, ties=ties)
    grown = new["embed_tokens"]["embedding"]
    assert new["decoder"]["embed_tokens"]["embedding"] is grown
    np.testing.assert_array_equal(new["lm_head"]["kernel"], grown.T)
    assert vocabulary.axes == {TABLE: 0, "decoder/embed_tokens/embedding": 0, "lm_head/kernel": 1}


def test_heads_and_biases_of_their_own():
    old = params(
        lm_head={"kernel": array(D, V, seed=3), "bias": array(V, seed=4)},
        final_logits_bias=array(1, V, seed=5),
        h={"0": {"mlp": {"kernel": array(V, D), "bias": array(V)}}},  # chance: inside of a layer
    )
    new, vocabulary = tied_lora.grow_vocabulary(old, 14, ties={"tie_word_embeddings": False})
    assert vocabulary.axes == {
        TABLE: 0, "final_logits_bias": 1, "lm_head/bias": 0, "lm_head/kernel": 1,
    }  # fmt: skip
    assert new["h"]["0"]["mlp"]["kernel"] is old["h"]["0"]["mlp"]["kernel"]
    for path in (("lm_head", "bias"), ("lm_head", "kernel"), ("final_logits_bias",)):
        before: Any = old
        after: Any = new
        for name in path:
            before, after = before[name], after[name]
        assert after.shape == (*before.shape[:-1], 14)
        np.testing.assert_array_equal(after[..., :V], before)
        mean = jnp.mean(before, axis=-1, keepdims=True)  # over the tokens
        np.testing.assert_allclose(after[..., V:], jnp.tile(mean, 2), atol=5e-4)


def test_a_leaf_that_may_belong_to_the_vocabulary():
    old = params(wpe={"embedding": array(V, D)}, stack={"kernel": array(3, V, D)})
    with pytest.raises(ValueError, match=r"'stack/kernel' float32\[3, 12, 8\].* \(2 such leaves\)"):
        tied_lora.grow_vocabulary(old, 14)
    with pytest.raises(ValueError, match=r"leaves=\{'wpe/embedding': 0\}, or None"):
        tied_lora.grow_vocabulary(old, 14, leaves={"stack/kernel": 1})
    new, _ = tied_lora.grow_vocabulary(old, 14, leaves={"stack/kernel": 1, "wpe/embedding": None})
    assert new["stack"]["kernel"].shape == (3, 14, D)
    assert new["wpe"]["embedding"].shape == (V, D)
    assert new["embed_tokens"]["embedding"].shape == (14, D)


def test_a_table_called_otherwise():
    old = {"tok": {"weight": array(V, D)}, "out": {"w": array(D, V), "b": array(V)}}
    with pytest.raises(ValueError, match="the input embedding could be no leaf; say which"):
        tied_lora.grow_vocabulary(old, 14)
    new, vocabulary = tied_lora.grow_vocabulary(
        old, 14, leaves={"tok/weight": 0, "out/w": 1, "out/b": 0}
    )
    assert jax.tree.map(jnp.shape, new) == {
        "tok": {"weight": (14, D)}, "out": {"w": (D, 14), "b": (14,)},
    }  # fmt: skip
    assert next(iter(vocabulary.axes)) == "tok/weight"
    two = {"a": {"embedding": array(V, D)}, "b": {"embedding": array(9, D)}}
    with pytest.raises(ValueError, match="could be 'a/embedding', 'b/embedding'; say which"):
        tied_lora.grow_vocabulary(two, 14)
    assert tied_lora.grow_vocabulary(two, 14, leaves={"a/embedding": 0})[1].size == 14
    sites = tied_lora.trace(lambda p, x: p["tok"]["weight"][x] @ p["out"]["w"], old, jnp.arange(3))
    with pytest.raises(ValueError, match=r"'out/b' float32\[12\]"):
        tied_lora.grow_vocabulary(old, 14, sites=sites)
    assert tied_lora.grow_vocabulary(old, 14, sites=sites, leaves={"out/b": None})[1].axes == {
        "tok/weight": 0, "out/w": 1,
    }  # fmt: skip


def test_padded_tables():
    """With `old_tokens`, padding that a table has already is used before rows are added."""
    old = params()
    new, vocabulary = tied_lora.grow_vocabulary(old, 11, old_tokens=9)
    assert (vocabulary.size, vocabulary.new_tokens, vocabulary.padding) == (
        V, range(9, 11), range(11, V),
    )  # fmt: skip
    table, before = new["embed_tokens"]["embedding"], old["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(table[:9], before[:9])
    np.testing.assert_allclose(table[9:], jnp.tile(before[:9].mean(0), (3, 1)), atol=3e-4)
    assert tied_lora.grow_vocabulary(old, 13, old_tokens=9)[1].size == 13


def test_nothing_to_do_changes_nothing():
    old = params()
    new, vocabulary = tied_lora.grow_vocabulary(old, V)
    assert new["embed_tokens"]["embedding"] is old["embed_tokens"]["embedding"]
    assert not vocabulary.new_tokens
    assert tied_lora.grow_vocabulary(old, V, pad_to_multiple_of=8)[1].padding == range(12, 16)


def test_abstract_and_boxed_params():
    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    boxed = params()
    boxed["embed_tokens"] = {
        "embedding": nn.Partitioned(boxed["embed_tokens"]["embedding"], names=("vocab", "embed"))
    }
    new, vocabulary = tied_lora.grow_vocabulary(boxed, 14)
    assert vocabulary.axes == {TABLE: 0}
    box = new["embed_tokens"]["embedding"]
    assert isinstance(box, nn.Partitioned)
    assert (box.names, box.value.shape) == (("vocab", "embed"), (14, D))
    shapes = {"embed": {"embedding": jax.ShapeDtypeStruct((V, D), "bfloat16", sharding=sharding)}}
    new, _ = tied_lora.grow_vocabulary(shapes, 16)
    assert new["embed"]["embedding"] == jax.ShapeDtypeStruct((16, D), "bfloat16", sharding=sharding)
    with pytest.raises(ValueError, match=r"split in 4 along axis 0, and 14 rows.*multiple_of=4"):
        tied_lora.grow_vocabulary(shapes, 14)
    under_jit = jax.eval_shape(lambda p: tied_lora.grow_vocabulary(p, 14)[0], params())
    assert under_jit["embed_tokens"]["embedding"].shape == (14, D)
    state = nnx.State({"embed": {"embedding": nnx.Param(array(V, D))}})
    new, _ = tied_lora.grow_vocabulary(state, 14)
    assert new["embed"]["embedding"][...].shape == (14, D)


def test_mask():
    _, vocabulary = tied_lora.grow_vocabulary(params(), 13, pad_to_multiple_of=8)
    logits = array(2, 16, dtype=jnp.bfloat16)
    masked = vocabulary.mask(logits)
    assert masked.dtype == jnp.bfloat16
    np.testing.assert_array_equal(masked[:, :13], logits[:, :13])
    assert jnp.all(masked[:, 13:] == -jnp.inf)
    grads = jax.grad(lambda x: -jax.nn.log_softmax(vocabulary.mask(x))[:, 3].sum())(
        logits.astype(jnp.float32)
    )
    assert jnp.all(jnp.isfinite(grads))
    assert jnp.all(grads[:, 13:] == 0)
    with pytest.raises(ValueError, match=r"logits are float32\[15\]; expected \[..., 16\]"):
        vocabulary.mask(array(15))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"n_tokens": 11}, ValueError, "n_tokens=11, and there are 12 tokens.*old_tokens="),
        ({"n_tokens": 8, "old_tokens": 9}, ValueError, "n_tokens=8, and there are 9 tokens"),
        ({"old_tokens": 13}, ValueError, "old_tokens=13, and the table has 12 rows"),
        ({"n_tokens": 14.0}, TypeError, "n_tokens=14.0; expected an int above 0"),
        ({"pad_to_multiple_of": 0}, TypeError, "pad_to_multiple_of=0; expected an int above 0"),
        ({"pad_to_multiple_of": True}, TypeError, "pad_to_multiple_of=True; expected an int"),
        ({"init": "median"}, ValueError, "init='median' for .*; expected 'mean'"),
        ({"init": jnp.zeros((3, D))}, ValueError, r"init .* float32\[3, 8\]; expected a row"),
        ({"init": jnp.zeros((2, 3))}, ValueError, r"init .* float32\[2, 3\]; expected a row"),
        ({"init": lambda k, s, d: jnp.zeros(3)}, ValueError, r"the initializer gave float32\[3\]"),
        ({"init": {TABLE: jnp.float32(1)}}, ValueError, r"init .* float32\[\]; expected a row"),
        ({"init": {"up/kernel": "mean"}}, ValueError, "init has 'up/kernel', which is no leaf"),
        ({"leaves": {"embed/embedding": 0}}, ValueError, "is no leaf of the params.*embed_tokens"),
        ({"leaves": {TABLE: 2}}, ValueError, "leaves.* is 2, and the leaf is .*from 0 to 1"),
        ({"leaves": {TABLE: "0"}}, TypeError, "is '0'; expected the number of its vocabulary"),
        ({"leaves": {TABLE: 0, "up/bias": 0}}, ValueError, "'up/bias' .* has 20 entries .*; expec"),
        ({"rng": 3}, TypeError, "rng is a int; expected a key"),
    ],
)  # fmt: skip
def test_bad_input(options, error, text):
    options = {"n_tokens": 14, **options}
    with pytest.raises(error, match=text):
        tied_lora.grow_vocabulary(params(), **options)


def test_bad_ties():
    table = array(V, D)
    tied = {"embed": {"embedding": table}, "head": {"kernel": table.T}}
    ties = [("embed/embedding", "head/kernel")]
    for axis in (0, None):
        with pytest.raises(ValueError, match=r"'head/kernel' is tied .* axis 1; .* says otherwise"):
            tied_lora.grow_vocabulary(
                tied, 14, ties=ties, leaves={"embed/embedding": 0, "head/kernel": axis}
            )
    adapted = tied_lora.wrap(tied, tied_lora.LoraConfig(target_modules=["embed"]), ties=ties)
    with pytest.raises(TypeError, match="with an Adapted, whose plan has them"):
        tied_lora.grow_vocabulary(adapted, 14, ties=ties)
    with pytest.raises(TypeError, match=r"is a marker of a tie group.*; pass the Adapted"):
        tied_lora.grow_vocabulary(adapted.params, 14)
    with pytest.raises(ValueError, match="'head/kernel' in leaves is stored as 'embed/embedding'"):
        tied_lora.grow_vocabulary(adapted, 14, leaves={"head/kernel": 1})
