"""Call sites as data: union, JSON, hashing, scopes, the table."""

from __future__ import annotations

import pytest

from flax_tied_lora import CallSite, CallSites, Read
from flax_tied_lora._interpreter.sites import module_scope, numbered, with_batch
from flax_tied_lora._tree.table import table

LOOKUP = CallSite("embed/embedding", "gather", 0, "M/embed", "lookup", (0,), (1,))
HEAD = CallSite("embed/embedding", "dot_general", 0, "M/embed.attend", "projection", (1,), (0,))
STACKED = CallSite("layers/kernel", "dot_general", 0, "M/layers", "projection", (1,), (2, 3), (0,))
BIAS = CallSite("bias", "add")
ALL = CallSites((LOOKUP, HEAD, STACKED, BIAS))


def test_union_keeps_order_and_counts_once():
    both = CallSites((LOOKUP, HEAD)) | CallSites((STACKED, LOOKUP))
    assert both.sites == (LOOKUP, HEAD, STACKED)
    assert ALL | ALL == ALL
    assert CallSites() | ALL == ALL


def test_an_einsum_formula_is_no_scope():
    assert module_scope("jvp(M)/attn/bqhd,bkhd->bhqk", "q") == "M/attn/q"


def test_sites_of_leaves():
    assert ALL.of("embed/embedding") == (LOOKUP, HEAD)
    assert ALL.of("bias", "layers/kernel") == (STACKED, BIAS)
    assert ALL.of("nothing") == ()
    assert ALL.leaves() == ("embed/embedding", "layers/kernel", "bias")
    assert (len(ALL), list(ALL)) == (4, [LOOKUP, HEAD, STACKED, BIAS])


def test_json_round_trip():
    again = CallSites.from_json(ALL.to_json())
    assert again == ALL
    assert hash(again) == hash(ALL)
    assert {ALL: 1}[again] == 1


@pytest.mark.parametrize(
    "text", ["", "{}x", "[1]", "[{}]", '[{"leaf": "a"}]', "3",
             ALL.to_json().replace('"lookup"', '"looks"'), ALL.to_json().replace('"leaf"', '"lef"')]
)  # fmt: skip
def test_json_of_something_else(text):
    with pytest.raises(ValueError, match="not the JSON of call sites"):
        CallSites.from_json(text)


def test_ordinals_count_leaf_and_operation():
    sites = [LOOKUP, HEAD, LOOKUP, STACKED, HEAD, LOOKUP]
    ordinals = [r.site.ordinal for r in numbered(Read(s, "plain") for s in sites)]
    assert ordinals == [0, 0, 1, 0, 1, 2]


def test_axes_that_were_walked_are_batch():
    read = Read(CallSite("w", "dot_general", role="projection", rows=(1,), cols=(2,)), "plain")
    [done] = with_batch([read], {"w": 4})
    assert done.site.batch == (0, 3)
    assert with_batch([read], {}) == (read,)
    assert with_batch([Read(BIAS, "plain")], {"bias": 1}) == (Read(BIAS, "plain"),)


@pytest.mark.parametrize(
    ("stacks", "scope"),
    [
        (("Model/embed",), "Model/embed"),
        (("transpose(jvp(Model))/embed.attend", ""), "Model/embed.attend"),
        (("vmap(Model)/while/body/layers",), "Model/layers"),
        (("Model", "checkpoint/rematted_computation/layer"), "Model/layer"),
        (("jvp()", ""), ""),
        (("Model/jit(_take)",), "Model/_take"),
    ],
)
def test_scope_without_the_marks_of_transformations(stacks, scope):
    assert module_scope(*stacks) == scope


def test_prints_a_table():
    lines = str(ALL).splitlines()
    assert lines[0].split() == ["leaf", "operation", "role", "rows", "cols", "batch", "scope"]
    assert lines[2].split() == [
        "embed/embedding",
        "gather",
        "#0",
        "lookup",
        "0",
        "1",
        "-",
        "M/embed",
    ]
    assert lines[4].split()[4:8] == ["1", "2,3", "0", "M/layers"]
    assert len(lines) == 6
    assert str(LOOKUP) == "gather #0 of 'embed/embedding' in M/embed (lookup)"


def test_table_groups_thousands():
    assert table(("a", "b"), [(1234567, "")]) == "a          b\n---------  -\n1,234,567  -"
