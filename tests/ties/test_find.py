"""find_ties: each source of truth, orientations, canonical members, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import CallSite, CallSites, Member, TieGroup, find_ties

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


def test_nothing_is_tied():
    assert find_ties(model(head=E.T + 1)) == []
    assert find_ties({}) == []


# The same array in two places


@pytest.mark.parametrize("array", [E, np.asarray(E)], ids=["jax", "numpy"])
def test_same_array_object(array):
    ties = find_ties({"a": {"kernel": array}, "b": {"embedding": array}, "c": array + 1})
    assert ties == [group("b/embedding", "a/kernel", found="same array")]


def test_equal_arrays_are_not_the_same_array():
    assert find_ties({"a": E, "b": E + 0, "c": np.asarray(E)}) == []


def test_same_scalar_object_is_no_tie():
    scalar = jnp.float32(1)
    assert find_ties({"a": scalar, "b": scalar}) == []


def test_three_places():
    ties = find_ties({"x": E, "y": [E, {"embedding": E}]})
    assert ties == [group("y/1/embedding", "x", "y/0", found="same array")]


def test_two_tracers_are_not_known_to_be_one():
    seen = []
    jax.eval_shape(lambda p: seen.append(find_ties(p)), {"a": E, "b": E})
    assert seen == [[]]


# Declared


def test_declared_transposed_by_its_shape():
    ties = find_ties(model(head=E.T), [(HEAD, EMBED)])
    assert ties == [group(EMBED, (HEAD, True), found="declared")]
    assert (ties[0].key, ties[0].paths) == (EMBED, (EMBED, HEAD))


def test_declared_as_it_is_by_its_shape():
    ties = find_ties(model(head=E), [(EMBED, HEAD)])
    assert ties == [group(EMBED, HEAD, found=("same array", "declared"))]


@pytest.mark.parametrize(("how", "transposed"), [("same", False), ("transposed", True)])
def test_both_orientations_fit(how, transposed):
    params = model(SQUARE + 1, SQUARE + 2)
    with pytest.raises(ValueError, match=r"both float32\[8, 8\], so either orientation fits"):
        find_ties(params, [(EMBED, HEAD)])
    assert find_ties(params, [(EMBED, HEAD, how)]) == [
        group(EMBED, (HEAD, transposed), found="declared")
    ]


def test_declared_as_tie_groups():
    given = group(EMBED, (HEAD, True), found="equal values")
    assert find_ties(model(head=E.T), [given]) == [given]
    unnamed = TieGroup(given.members)
    assert find_ties(model(head=E.T), [unnamed]) == [
        group(*((m.path, m.transposed) for m in given.members), found="declared")
    ]


def test_what_was_found_can_be_given_back():
    params = {"a": {"embedding": E}, "b": E, "c": E.T}
    found = find_ties(params, [("a/embedding", "c")])
    assert find_ties(jax.eval_shape(lambda: params), found)[0].members == found[0].members


def test_three_way_with_two_orientations():
    params = {"enc": {"embedding": E + 0}, "dec": {"embedding": E + 0}, "head": {"kernel": E.T}}
    ties = find_ties(params, [("head/kernel", "enc/embedding"), ("head/kernel", "dec/embedding")])
    assert ties == [
        group("dec/embedding", "enc/embedding", ("head/kernel", True), found="declared")
    ]


def test_orientations_that_contradict():
    params = {"a": SQUARE, "b": SQUARE + 1, "c": SQUARE + 2}
    pairs = [("a", "b", "same"), ("b", "c", "same"), ("a", "c", "transposed")]
    with pytest.raises(ValueError, match="tied to 'a' both as it is and transposed; check ties"):
        find_ties(params, pairs)


def test_abstract_members_are_never_canonical():
    placeholder = jax.ShapeDtypeStruct((12, 8), jnp.float32)
    ties = find_ties(model(placeholder, E.T), [(EMBED, HEAD)])
    assert ties == [group(HEAD, (EMBED, True), found="declared")]
    assert find_ties(model(E, jax.ShapeDtypeStruct((8, 12), jnp.float32)), [(EMBED, HEAD)]) == [
        group(EMBED, (HEAD, True), found="declared")
    ]


# Data flow


LOOKUP = CallSite(EMBED, "gather", role="lookup", rows=(0,), cols=(1,))
PROJECTION = CallSite(EMBED, "dot_general", role="projection", rows=(1,), cols=(0,))


def test_one_leaf_read_twice():
    assert find_ties(model(), sites=CallSites((LOOKUP, PROJECTION))) == [
        group(EMBED, found="data flow")
    ]
    assert find_ties(model(), sites=CallSites((LOOKUP,))) == []


def test_data_flow_is_named_beside_other_sources():
    params = {"a": {"w": E}, "b": {"w": E}}
    sites = CallSites((CallSite("a/w", "dot_general"), CallSite("b/w", "gather", role="lookup")))
    assert find_ties(params, sites=sites) == [
        group("b/w", "a/w", found=("same array", "data flow"))
    ]


# Order and words


def test_canonical_member_is_what_is_looked_up():
    params = {"a": {"embedding": E}, "b": {"kernel": E}}
    assert find_ties(params)[0].key == "a/embedding"
    sites = CallSites((CallSite("b/kernel", "gather", role="lookup"),))
    assert find_ties(params, sites=sites)[0].key == "b/kernel"


def test_all_sources_are_named_in_a_fixed_order():
    params = model(head=E, name="lm_head")
    ties = find_ties(
        params, [(EMBED, HEAD)], equal_values=True, sites=CallSites((LOOKUP, PROJECTION))
    )
    assert ties[0].found == ("same array", "declared", "equal values", "data flow")
    assert str(ties[0]) == (f"{EMBED} = {HEAD} [same array, declared, equal values, data flow]")
    assert "lm_head/kernel (transposed)" in str(find_ties(model(head=E.T), [(EMBED, HEAD)])[0])


def test_params_are_not_changed():
    params = model(head=E.T)
    before = jax.tree.leaves(params)
    tied_lora.find_ties(params, [(EMBED, HEAD)], equal_values=True)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(params), strict=True))
