"""Leaf paths: names of leaves in any pytree, matching, neighbours, layer numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import FrozenDict, meta

from flax_tied_lora._tree.paths import (
    TiedLeaf,
    describe,
    flatten,
    is_marker,
    layer_index,
    leaf_name,
    matches,
    module_of,
    nearby,
)
from tests.helpers.named_arrays import NamedArray

X = jnp.ones((2, 3))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Table:
    """A module with one param, and fields called as an array's attributes: no array of its own."""

    weight: Any
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(default=(2, 3), metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Parameter:
    """As Penzai has it: a box of boxes."""

    value: NamedArray


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"a": {"kernel": X}}, ["a/kernel"]),
        (FrozenDict({"a": {"kernel": X}}), ["a/kernel"]),
        ({"a": [X, (X, X)]}, ["a/0", "a/1/0", "a/1/1"]),
        ({"a": Block(X, X)}, ["a/kernel", "a/bias"]),
        ({"a": {"kernel": nn.Partitioned(X, ("x", None))}}, ["a/kernel"]),
        ({"a": {"value": X}}, ["a/value"]),
        ({"a": {"weight": NamedArray(X, "xy"), "bias": NamedArray(X)}}, ["a/bias", "a/weight"]),
        ({"a": Parameter(NamedArray(X)), "b": X}, ["a", "b"]),
        ({"a": NamedArray(TiedLeaf("b")), "b": X}, ["a", "b"]),
        ({"a": NamedArray(None), "b": X}, ["b"]),
        ({"a": NamedArray({"array": X})}, ["a/array/array"]),
        ({"a": Table(X), "b": Table(NamedArray(X))}, ["a/weight", "b/weight"]),
        ({"layers": {3: X}}, ["layers/3"]),
        ({"a": None, "b": X}, ["b"]),
        ({}, []),
    ],
)
def test_names_of_leaves(tree, names):
    assert list(flatten(tree)[0]) == names


def test_a_structure_with_boxes_takes_its_leaves_again():
    tree = {"a": NamedArray(X, "xy"), "b": Table(NamedArray(TiedLeaf("a"))), "c": X}
    leaves, treedef = flatten(tree)
    again = jax.tree.unflatten(treedef, leaves.values())
    assert again["a"].array is X
    assert again["a"].names == "xy"
    assert again["b"].weight.array == TiedLeaf("a")


def test_names_of_an_nnx_state():
    _, state = nnx.split(Net(nnx.Rngs(0)))
    names = ["embed/embedding"] + [f"layers/{i}/{n}" for i in range(2) for n in ("bias", "kernel")]
    assert list(flatten(state)[0]) == names


def test_flatten_gives_back_the_tree():
    tree = {"b": nn.LogicallyPartitioned(X, ("v", "d")), "a": [X, TiedLeaf("b", True)]}
    leaves, treedef = flatten(tree)
    again = jax.tree.unflatten(treedef, list(leaves.values()))
    assert again["a"][1] == TiedLeaf("b", True)
    assert isinstance(again["b"], meta.AxisMetadata)
    assert again["b"].names == ("v", "d")
    assert jax.tree.structure(again) == jax.tree.structure(tree)


def test_markers_have_no_leaves():
    marker = TiedLeaf("embed/embedding", True)
    assert is_marker(marker)
    assert jax.tree.leaves(marker) == []
    assert repr(marker) == "TiedLeaf('embed/embedding', transposed)"
    assert {marker: 1}[TiedLeaf("embed/embedding", True)] == 1
    assert marker != TiedLeaf("embed/embedding")


@pytest.mark.parametrize(
    ("target", "path", "found"),
    [
        (["q_proj"], "model/layers/0/q_proj", "q_proj"),
        (["v_proj", "layers.0.q_proj"], "model/layers/0/q_proj", "layers.0.q_proj"),
        (["layers/0/q_proj"], "model/layers/0/q_proj", "layers/0/q_proj"),
        (["q_proj"], "model/xq_proj", None),
        (["model"], "model/q_proj", None),
        (["q.*"], "q_proj", None),
        (r".*\.q_proj", "model/q_proj", r".*\.q_proj"),
        (r".*/(q|v)_proj", "model/q_proj", r".*/(q|v)_proj"),
        (r"q_proj", "model/q_proj", None),
    ],
)
def test_matches(target, path, found):
    assert matches(target, path) == found


@pytest.mark.parametrize(
    ("path", "pattern", "index"),
    [
        ("model/layers/3/q_proj", None, 3),
        ("model/layers_3/q_proj", None, 3),
        ("model/layers/3/experts/1/up", None, 3),
        ("model/layers/3/experts/1/up", ("experts",), 1),
        ("h/0/attn", ("h",), 0),
        ("h/0/attn", ("layers",), None),
        ("h/0/attn", ("layers", "h"), 0),
        ("embed_tokens", None, None),
    ],
)
def test_layer_index(path, pattern, index):
    assert layer_index(path, pattern) == index


def test_parts_of_a_path():
    assert module_of("a/b/kernel") == "a/b"
    assert module_of("kernel") == ""
    assert leaf_name("a/b/kernel") == "kernel"
    assert describe(X) == "float32[2, 3]"
    assert describe(3) == "int[]"


def test_nearby_names():
    names = ["m/q_proj", "m/k_proj", "m/embed_tokens"]
    assert nearby("q_prj", names)[0] == "m/q_proj"
    assert nearby("embed_token", names) == ["m/embed_tokens"]
    assert sorted(nearby("zzzzzz", names)) == sorted(names)
