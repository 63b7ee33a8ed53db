"""Leaves with the values of another: a loader copied what is tied."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array

TABLE = array(12, 4, seed=1)
PAD = TABLE.at[0].set(0.0)  # a row of zeros, as padding tokens have


def params_of(table, head):
    return {"embed": {"embedding": table}, "head": {"kernel": head}, "up": {"kernel": array(4, 4)}}


def warned(params, *targets, **options):
    config = tied_lora.LoraConfig(r=2, target_modules=list(targets))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tied_lora.wrap(params, config, **options)
    return [str(w.message) for w in caught if w.category is tied_lora.WeightTyingWarning]


@pytest.mark.parametrize("table", [TABLE, PAD, TABLE.astype(jnp.bfloat16), np.asarray(TABLE)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_is_said_with_the_line_that_ties_it(table, transposed):
    params = params_of(table, jnp.array(table.T if transposed else table))
    for target, other in (("embed", "head"), ("head", "embed")):
        (text,) = warned(params, target)
        names = {"embed": "embed/embedding", "head": "head/kernel"}
        assert text.startswith(f"wrap: {names[other]!r} has the values of {names[target]!r}")
        line = f'ties=[("{names[target]}", "{names[other]}")]'
        assert line in text
        options = eval(f"dict({line})")
        assert not warned(params, target, **options)
        assert len(tied_lora.wrap(
            params, tied_lora.LoraConfig(r=2, target_modules=[target]), **options
        ).plan.adapted[0].members) == 2  # fmt: skip
    assert not warned(params, "embed", ties=[])
    assert not warned(params, "up")


@pytest.mark.parametrize(
    "head",
    [TABLE.T.at[3, 5].add(1.0), TABLE.T.at[0, 0].add(1.0), TABLE[:11].T, jnp.ones((4, 12)),
     TABLE.T.astype(jnp.float16), jax.ShapeDtypeStruct((4, 12), jnp.float32)],
)  # fmt: skip
def test_others_are_none(head):
    assert not warned(params_of(TABLE, head), "embed")


def test_equal_kernels_are_no_tie():
    kernel = array(4, 4)
    params = {"q": {"kernel": kernel}, "k": {"kernel": jnp.array(kernel)}}
    assert not warned(params, "q")


def test_nothing_is_compared_in_a_traced_function():
    params = params_of(TABLE, jnp.array(TABLE.T))
    config = tied_lora.LoraConfig(r=2, target_modules=["embed"])
    jax.eval_shape(lambda p: tied_lora.wrap(p, config).adapters, params)
