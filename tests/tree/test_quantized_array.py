"""`QuantizedArray`: the form in which it is stored; what stands for an array of the params."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from flax_tied_lora._tree.quantized_array import (
    QuantizedArray,
    array_of,
    dequantized_leaves,
    is_quantized,
    plain_array,
)


def stored(qtype: str, axis: int = 1) -> QuantizedArray:
    """Returns shapes only: what is asked here needs no numbers."""
    entries = 1 if qtype == "int8" else 2
    shape = [6, 8]
    shape[axis] //= entries
    scales = [6, 8]
    scales[axis] = 2
    values = jax.ShapeDtypeStruct(tuple(shape), jnp.int8 if entries == 1 else jnp.uint8)
    return QuantizedArray(values, jax.ShapeDtypeStruct(tuple(scales), jnp.bfloat16), qtype, axis)


@pytest.mark.parametrize("qtype", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("axis", [0, 1])
def test_shape_and_dtype_are_the_array_s(qtype, axis):
    leaf = stored(qtype, axis)
    assert (leaf.shape, leaf.ndim, leaf.size, leaf.dtype) == ((6, 8), 2, 48, jnp.bfloat16)
    block, scales = (3, 16) if axis == 0 else (4, 12)
    assert leaf.nbytes == 48 // (1 if qtype == "int8" else 2) + 2 * scales
    assert repr(leaf) == f"QuantizedArray(bfloat16[6, 8] as {qtype}, blocks of {block})"


def test_is_a_pytree_of_its_integers_and_scales():
    leaf = stored("nf4")
    leaves, tree = jax.tree.flatten(leaf)
    assert leaves == [leaf.values, leaf.scales]
    again = jax.tree.unflatten(tree, leaves)
    assert (again.qtype, again.axis) == ("nf4", 1)
    assert tree != jax.tree.structure(stored("int4"))
    assert repr(jax.tree.unflatten(tree, ["v", "s"])) == "QuantizedArray(v, s, 'nf4', 1)"


def test_transposed_its_blocks_lie_along_the_other_axis():
    leaf = QuantizedArray(jnp.ones((6, 8), jnp.int8), jnp.ones((6, 2)), "int8", 1)
    assert (leaf.T.shape, leaf.T.axis, leaf.T.scales.shape) == ((8, 6), 0, (2, 6))


def test_what_is_stored_and_what_it_stands_for():
    leaf, plain = stored("int8"), jnp.ones(3)
    assert is_quantized(leaf)
    assert not is_quantized(plain)
    assert array_of(leaf) is leaf.values
    assert array_of(plain) is plain
    assert plain_array(plain) is plain


def test_a_leaf_that_is_shared_is_dequantised_once(monkeypatch):
    monkeypatch.setattr(QuantizedArray, "dequantize", lambda self: object())
    leaf = stored("int8")
    leaves = {"a": leaf, "b": leaf, "c": stored("int8"), "d": jnp.ones(3)}
    found = dequantized_leaves(leaves)
    assert set(found) == {"a", "b", "c"}
    assert found["a"] is found["b"] is not found["c"]
