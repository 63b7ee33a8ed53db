"""Tables for people: aligned, and the same module of all layers in one row."""

from __future__ import annotations

from flax_tied_lora._tree.table import folded, table


def test_columns_are_aligned_and_numbers_grouped():
    assert table(("leaf", "size"), [("a/b", 12345), ("c", ())]) == (
        "leaf  size\n----  ------\na/b   12,345\nc     -"
    )


def test_rows_that_differ_only_in_the_layer_are_one():
    rows = [
        ("layers/0/q/kernel", "dot #0", 3, "Model/layers/0"),
        ("head/kernel", "dot #0", 5, "Model/head"),
        ("layers/1/q/kernel", "dot #0", 4, "Model/layers/1"),
    ]
    assert folded(rows, sums=[2]) == [
        ("layers/*/q/kernel (2)", "dot #0", 7, "Model/layers/*"),
        ("head/kernel", "dot #0", 5, "Model/head"),
    ]


def test_rows_that_differ_elsewhere_stay_apart():
    rows = [("h_0/kernel", "low rank", 1), ("h_1/kernel", "dense", 1), ("h_2/kernel", "dense", 1)]
    assert folded(rows, sums=[2]) == [rows[0], ("h_*/kernel (2)", "dense", 2)]


def test_a_number_that_is_no_layer_is_kept():
    rows = [("conv2d/kernel", 1), ("conv3d/kernel", 1)]
    assert folded(rows, sums=[1]) == rows
