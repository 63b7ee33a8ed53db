"""Ties that are known from a model's config, or from equal values where that is asked for."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_tied_lora import Member, TieGroup, find_ties

RNG = np.random.default_rng(0)
E = jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32)
SQUARE = jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)


def model(embedding=E, head=None, name="lm_head"):
    params = {"model": {"embed_tokens": {"embedding": embedding}, "up": {"kernel": SQUARE}}}
    return params if head is None else {**params, name: {"kernel": head}}


EMBED, HEAD = "model/embed_tokens/embedding", "lm_head/kernel"


def group(*members, found):
    paths = [(m, False) if isinstance(m, str) else m for m in members]
    return TieGroup(tuple(Member(*p) for p in paths), (found,) if isinstance(found, str) else found)


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("size", [{}, {"vocab_size": 12}])
def test_config_that_ties(as_dict, size):
    fields = {"tie_word_embeddings": True, **size}
    config = fields if as_dict else types.SimpleNamespace(**fields)
    assert find_ties(model(head=E.T + 1), config) == [
        group(EMBED, (HEAD, True), found="model config")
    ]


def test_config_that_ties_a_model_with_one_leaf():
    assert find_ties(model(), {"tie_word_embeddings": True}) == []


def test_config_that_unties():
    params = model(head=E)
    assert find_ties(params)[0].found == ("same array",)
    assert find_ties(params, {"tie_word_embeddings": False}) == []
    other = {**params, "x": SQUARE, "y": SQUARE}
    assert [t.key for t in find_ties(other, {"tie_word_embeddings": False})] == ["model/up/kernel"]


def test_equal_values_are_opt_in():
    params = model(head=E.T)
    assert find_ties(params) == []
    assert find_ties(params, equal_values=True) == [
        group(EMBED, (HEAD, True), found="equal values")
    ]


def test_equal_values_of_numpy_and_jax():
    params = {"a": np.asarray(E), "b": {"embedding": E}, "c": np.asarray(E).T.copy()}
    assert find_ties(params, equal_values=True) == [
        group("b/embedding", "a", ("c", True), found="equal values")
    ]


@pytest.mark.parametrize("array", [jnp.zeros((4, 4)), jnp.ones((4, 6)), jnp.full((2, 2), 0.5)])
def test_constant_arrays_never_count(array):
    assert find_ties({"a": array, "b": array + 0, "c": array.T + 0}, equal_values=True) == []


def test_difference_after_the_sample():
    wide = np.asarray(RNG.normal(size=(100, 90)), np.float32)
    late = wide.copy()
    late[-1, -1] += 1
    assert find_ties({"a": wide, "b": late, "c": late.T.copy()}, equal_values=True) == [
        group("b", ("c", True), found="equal values")
    ]


def test_other_dtype_shape_and_integers_do_not_count():
    params = {"a": E, "b": E.astype(jnp.bfloat16), "c": E[:6], "d": E.reshape(8, 12)}
    assert find_ties(params, equal_values=True) == []
    ids = jnp.arange(6).reshape(2, 3)
    assert find_ties({"a": ids, "b": ids + 0}, equal_values=True) == []


def test_equal_values_of_shapes_and_tracers_are_not_read():
    shapes = jax.eval_shape(lambda: {"a": E, "b": E})
    assert find_ties(shapes, equal_values=True) == []


def test_equal_stacked_values():
    stack = jnp.asarray(RNG.normal(size=(3, 4, 4)), jnp.float32)
    ties = find_ties({"a": stack, "b": stack + 0, "c": stack.swapaxes(1, 2)}, equal_values=True)
    assert ties == [group("a", "b", found="equal values")]
