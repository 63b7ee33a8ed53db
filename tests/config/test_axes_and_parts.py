"""Axes of leaves and parts of fused ones, as a config says them, and what a leaf makes of them."""

from __future__ import annotations

import pytest

from flax_tied_lora._config.axes_and_parts import axes, parts, parts_of_leaf, said_of


def test_axes_may_be_numbers_or_lists():
    assert dict(axes("axes", {"q": (1, [0, 2]), "k": [[0], -1]})) == {
        "q": ((1,), (0, 2)), "k": ((0,), (-1,)),
    }  # fmt: skip


@pytest.mark.parametrize("value", [3, "01", (0,), (0, 1, 2), (0, []), (0, "1"), (True, 0)])
def test_axes_that_are_none(value):
    with pytest.raises((TypeError, ValueError), match=r"LoraConfig: axes\[.*expected \(rows, colu"):
        axes("axes", {"q": value})


def test_parts_of_one_size_or_of_their_own():
    found = parts("parts", {"qkv": (1, ["q", "k"]), "up": [-1, {"a": 5, "b": 3}]})
    assert found["qkv"] == (1, ("q", "k"))
    assert found["up"] == (-1, {"a": 5, "b": 3})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (3, "for parts of one size"),
        ((0.5, ["q"]), "for parts of one size"),
        ((0, []), "for parts of one size"),
        ((0, ["q", "q"]), "for parts of one size"),
        ((0, ["a:b"]), "names of parts without ':', '/' and '.', found 'a:b'"),
        ((0, ["a", ""]), "found ''"),
        ((0, {"a": 0}), "sizes above 0, found 0"),
        ((0, {"a": True}), "sizes above 0, found True"),
    ],
)
def test_parts_that_are_none(value, says):
    with pytest.raises((TypeError, ValueError), match=r"LoraConfig: parts\['q'\]=") as error:
        parts("parts", {"q": value})
    assert says in str(error.value)


def test_a_leaf_is_named_by_itself_or_by_its_module():
    field = axes("axes", {"attn/q": (0, 1), "kernel": (1, 0)})
    assert said_of(field, "layers/0/attn/q/kernel") == ((1,), (0,))  # the leaf's own name counts
    assert said_of(field, "layers/0/attn/q/bias") == ((0,), (1,))
    assert said_of(field, "layers/0/up/bias") is None


def test_where_a_leaf_is_cut():
    field = parts("parts", {"qkv": (-1, {"q": 24, "k": 16, "v": 8}), "gate_up": (0, ["g", "u"])})
    found = parts_of_leaf(field, "attn/qkv/kernel", (16, 48))
    assert found == {"q": (1, 0, 24), "k": (1, 24, 40), "v": (1, 40, 48)}
    assert parts_of_leaf(field, "gate_up/kernel", (6, 2)) == {"g": (0, 0, 3), "u": (0, 3, 6)}
    assert parts_of_leaf(field, "down/kernel", (6, 2)) == {}


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((7, 2), "7 along axis 0 is not 2 times anything; give each part's size"),
        ((6, 3), r"for 'sum/kernel' \[6, 3\]: the sizes add up to 8; expected 3"),
        ((), "which has no axis"),
    ],
)
def test_leaves_that_cannot_be_cut_so(shape, says):
    sized = shape == (6, 3)
    said = (1, {"a": 5, "b": 3}) if sized else (0, ["a", "b"])
    with pytest.raises(ValueError, match=says):
        parts_of_leaf(parts("parts", {"sum": said}), "sum/kernel", shape)
