"""Random keys: both of JAX's kinds are taken, and a number of a name is the same everywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from flax_tied_lora._tree.keys import is_key, key_number, typed_key, uncommitted

KEY = jax.random.key(3)


def test_both_kinds_of_key_are_taken():
    assert typed_key("wrap", KEY) is KEY
    assert typed_key("wrap", jax.random.PRNGKey(3)) == KEY


@pytest.mark.parametrize(
    ("rng", "what"), [(0, "a int"), (jnp.ones(2), r"float32\[2\]"), (None, "a NoneType")]
)
def test_what_is_no_key_is_named(rng, what):
    with pytest.raises(TypeError, match=rf"^wrap: rng is {what}; expected a key, as jax.random"):
        typed_key("wrap", rng)


def test_a_name_s_number_depends_on_nothing_but_the_name():
    assert key_number("embed_tokens/embedding") == 0xC1CC6693
    assert key_number("a") != key_number("b")


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_committed_key_is_free_again_and_the_same(make):
    key = jax.device_put(make(3), jax.devices()[1])
    assert key.committed
    free = uncommitted(key)
    assert not free.committed
    assert free.dtype == key.dtype
    assert jnp.array_equal(jax.random.bits(free), jax.random.bits(make(3)))
    assert uncommitted(free) is free


def test_a_key_of_another_kind_stays_of_it():
    key = jax.device_put(jax.random.key(3, impl="rbg"), jax.devices()[1])
    assert jax.random.key_impl(uncommitted(key)) == jax.random.key_impl(key)


def test_a_traced_key_is_left_alone():
    def program(key):
        assert uncommitted(key) is key
        return key

    jax.eval_shape(program, KEY)


def test_which_leaves_are_keys():
    assert is_key(KEY)
    assert is_key(jax.eval_shape(lambda: KEY))
    assert not is_key(jax.random.PRNGKey(3))
    assert not is_key("a")
