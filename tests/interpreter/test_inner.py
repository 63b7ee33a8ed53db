"""Programs inside an equation: traced once for all leaves of one structure, under stand-ins."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import flax_tied_lora as tied_lora
from flax_tied_lora._adapters.terms import weights_of
from flax_tied_lora._interpreter.inner import Names, hidden_names, is_same, shown
from flax_tied_lora._tree.paths import flatten
from tests.helpers.oracle import array, wrapped

PARAMS = {f"layer_{i}": {"kernel": array(6, 6, seed=i)} for i in range(6)}
ADAPTED = wrapped(PARAMS, ["kernel"])
WEIGHTS = weights_of(ADAPTED, flatten(ADAPTED.params)[0])
A, B = WEIGHTS["layer_0/kernel"], WEIGHTS["layer_1/kernel"]
X = array(3, 6, seed=9)


def leaves_of(weight):
    return [origin.leaf for origin in weight.origins]


def test_stand_ins_are_numbered_in_the_order_in_which_they_are_met():
    names = Names()
    assert [names.hide(n) for n in ("b", "a", "b")] == ["#0", "#1", "#0"]
    assert [names.show(n) for n in ("#1", "#0", "other")] == ["a", "b", "other"]


def test_weights_of_one_structure_are_alike_under_stand_ins():
    (first, _), names = hidden_names([A, X])
    (other,), _ = hidden_names([B])
    assert jax.tree.structure(A) != jax.tree.structure(B)
    assert jax.tree.structure(first) == jax.tree.structure(other)
    assert leaves_of(first) == ["#0"]
    (again,) = shown([first], names)
    assert leaves_of(again) == ["layer_0/kernel"]
    assert jax.tree.structure(again) == jax.tree.structure(A)


def test_a_weight_is_another_if_any_of_its_arrays_is():
    leaves, tree = jax.tree.flatten(A)
    assert is_same(A, jax.tree.unflatten(tree, leaves))
    assert not is_same(A, jax.tree.unflatten(tree, [*leaves[:-1], leaves[-1] + 0]))
    assert not is_same(A, B)
    assert not is_same(X, X)


def functions_in(adapted):
    """Returns the inner programs of a model of six layers, one for each call of the layer."""
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def model(params, x):
        for i in range(6):
            x = layer(params[f"layer_{i}"]["kernel"], x)
        return x

    program = jax.make_jaxpr(tied_lora.adapt(model, on_dense="error"))(adapted, X)
    return [id(e.params["jaxpr"].jaxpr) for e in program.eqns if e.primitive.name == "jit"]


def test_six_layers_are_one_program_and_those_that_differ_are_two():
    every, some = functions_in(ADAPTED), functions_in(wrapped(PARAMS, ["layer_0", "layer_3"]))
    assert (len(every), len(set(every))) == (6, 1)
    assert (len(some), len(set(some))) == (6, 2)
    assert some[0] == some[3] != some[1]
