"""A call of which some arguments are traced: all else reaches the function, and comes back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

from flax_tied_lora._interpreter.tracing import Calls, filling

AVALS = [jax.ShapeDtypeStruct((2,), jnp.float32)]


def called(fn, *others, **keywords):
    """Returns the program of a call whose first argument is traced, and its outputs."""
    return Calls(fn, lambda values: ((values[0], *others), keywords)).jaxpr(AVALS)


def test_what_is_not_traced_reaches_the_function_as_it_is():
    mask, model = np.array([True, False]), object()
    seen = []

    def fn(x, mask, model, *, flag):
        seen.extend([mask, model, flag])
        return x * 2.0 if mask.any() else x

    closed, outputs = called(fn, mask, model, flag="on")
    assert seen[0] is mask
    assert seen[1] is model
    assert seen[2] == "on"
    found = outputs.filled(jaxpr_as_fun(closed)(jnp.ones(2)))
    assert found.tolist() == [2.0, 2.0]


def test_outputs_that_are_no_arrays_come_back_in_their_places():
    note = object()
    closed, outputs = called(lambda x: {"x": x + 1.0, "note": note, "pair": (x, "text", None)})
    assert len(closed.jaxpr.outvars) == 2
    found = outputs.filled(jaxpr_as_fun(closed)(jnp.zeros(2)))
    assert found["note"] is note
    assert found["pair"][1:] == ("text", None)
    assert found["x"].tolist() == [1.0, 1.0]


def test_an_object_that_hides_an_array_is_refused():
    class Hidden:
        def __init__(self, array):
            self.number, self.array = 3, array

    with pytest.raises(TypeError, match=r"returned a Hidden whose field 'array' holds arrays, and"):
        called(Hidden)
    _, outputs = called(lambda x: Hidden(np.ones(2)))
    assert outputs.filled([]).number == 3


def test_values_are_put_in_some_places_of_a_pytree():
    leaves, tree = jax.tree.flatten({"a": 1, "b": [2, 3]})
    fill = filling(tree, leaves, [0, 2])
    assert fill(["x", "y"]) == {"a": "x", "b": [2, "y"]}
    assert leaves == [1, 2, 3]
    with pytest.raises(ValueError, match="shorter"):
        fill(["x"])
