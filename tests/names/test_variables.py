"""Params that are a list of variables: a dict by their paths, and back in their order."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.names import by_path, in_order


class Variable(NamedTuple):
    path: str
    value: Any


class Model:
    """As Keras has it: layers in the order of their calls, which is not that of their names."""

    def __init__(self, *names: str):
        keys = jax.random.split(jax.random.key(0), len(names))
        shapes = {"embeddings": (32, 8), "kernel": (8, 8)}
        self.trainable_variables = [
            Variable(name, jax.random.normal(key, shapes[name.rpartition("/")[2]]) / 3)
            for name, key in zip(names, keys, strict=True)
        ]

    def stateless_call(self, trainable: list[jax.Array], tokens: jax.Array) -> jax.Array:
        table, *kernels = trainable
        x = table[tokens]
        for kernel in kernels:
            x = x + jnp.tanh(x @ kernel)
        return x @ table.T


NAMES = ("token_embedding/embeddings", "block_0/query/kernel", "block_0/key/kernel")


def test_leaves_are_called_by_the_variables_paths_and_come_back_in_the_variables_order():
    model, tokens = Model(*NAMES), jnp.arange(6)[None]
    params = by_path(model)
    assert tuple(params) == NAMES

    def logits(params, tokens):
        return model.stateless_call(in_order(model, params), tokens)

    base = logits(params, tokens)
    assert jnp.allclose(base, jax.jit(logits)(params, tokens), atol=1e-5)  # jit sorts the keys
    sites = tied_lora.trace(logits, params, tokens)
    config = tied_lora.LoraConfig(
        r=2, lora_alpha=1, target_modules=["token_embedding", "query"], init_lora_weights=False
    )
    adapted = tied_lora.wrap(params, config, sites=sites)
    assert {g.key for g in adapted.plan.adapted} == {NAMES[0], NAMES[1]}
    tied_lora.explain(logits, adapted, tokens).assert_tied()
    merged = in_order(model, tied_lora.merge(adapted))
    assert jnp.allclose(
        tied_lora.adapt(logits)(adapted, tokens), model.stateless_call(merged, tokens), atol=1e-5
    )
    assert (merged[2] == model.trainable_variables[2].value).all()


def test_variables_can_be_given_without_a_model():
    variables = Model(*NAMES).trainable_variables
    assert list(by_path(iter(variables[1:]))) == list(NAMES[1:])
    assert in_order(variables[1:], {NAMES[2]: 2, NAMES[1]: 1}) == [1, 2]


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (Model("d/kernel", "d/kernel"), ValueError, "two variables have the path 'd/kernel'"),
        (3, TypeError, "expected a model with trainable_variables, or variables, got int"),
        ([jnp.ones(3)], TypeError, "expected variables with a path"),
    ],
)
def test_what_has_no_paths_of_its_own_is_refused(model, error, text):
    with pytest.raises(error, match="by_path: " + re.escape(text)):
        by_path(model)
    with pytest.raises(error, match="in_order: " + re.escape(text)):
        in_order(model, {})


def test_params_of_another_model_are_refused():
    model = Model(*NAMES)
    params = by_path(model)
    with pytest.raises(ValueError, match="'extra/kernel' is no variable of the model; nearby"):
        in_order(model, {**params, "extra/kernel": 0})
    value = params.pop(NAMES[1])
    with pytest.raises(ValueError, match="params have no 'block_0/query/kernel'; nearby"):
        in_order(model, {**params, "block_0/q/kernel": value})
    adapted: Any = tied_lora.wrap(
        by_path(model), tied_lora.LoraConfig(r=2, target_modules=["query"])
    )
    with pytest.raises(TypeError, match=r"got Adapted; an Adapted becomes such params inside of"):
        in_order(model, adapted)
