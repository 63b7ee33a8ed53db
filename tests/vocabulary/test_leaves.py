"""Which leaves have an entry for each token, by name, by tie and as the caller says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from flax_tied_lora import Member, TieGroup
from flax_tied_lora._vocabulary.leaves import vocabulary_axes

EMBED, HEAD = "embed_tokens/embedding", "lm_head/kernel"


def axes(shapes, ties=(), **named):
    leaves = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
    tied = {m.path for g in ties for m in g.members}
    groups = [*ties, *(TieGroup((Member(p),)) for p in shapes if p not in tied)]
    paths = {name.replace("__", "/"): axis for name, axis in named.items()}
    return vocabulary_axes(leaves, groups, None, paths)


BODY = {EMBED: (12, 8), "layers/0/up/kernel": (8, 12), "layers/0/up/bias": (12,)}


def test_layers_of_the_same_size_are_chance():
    assert axes(BODY) == (EMBED, {EMBED: 0})


def test_a_head_its_bias_and_a_second_table_of_that_name():
    shapes = {**BODY, HEAD: (8, 12), "lm_head/bias": (12,), "logits_bias": (1, 12),
              "shared/embedding": (12, 4)}  # fmt: skip
    assert axes(shapes, shared__embedding=0, embed_tokens__embedding=0)[1] == {
        "shared/embedding": 0, EMBED: 0, HEAD: 1, "lm_head/bias": 0, "logits_bias": 1,
    }  # fmt: skip
    assert axes({**BODY, HEAD: (12, 8)})[1] == {EMBED: 0, HEAD: 0}


@pytest.mark.parametrize(("transposed", "axis"), [(True, 1), (False, 0)])
def test_what_is_tied_has_the_axis_of_what_it_is_tied_to(transposed, axis):
    tie = TieGroup((Member(EMBED), Member("other/w", transposed)), ("declared",))
    shapes = {EMBED: (12, 8), "other/w": (8, 12) if transposed else (12, 8)}
    assert axes(shapes, [tie])[1] == {EMBED: 0, "other/w": axis}
    with pytest.raises(ValueError, match=r"is tied to .*whose vocabulary is its .*says otherwise"):
        axes(shapes, [tie], other__w=1 - axis, embed_tokens__embedding=0)


def test_a_leaf_that_nobody_can_tell():
    with pytest.raises(
        ValueError, match=r"'mix/kernel' float32\[12, 5\] \(1 such leaves\) have an"
    ):
        axes({**BODY, "mix/kernel": (12, 5)})
    assert axes({**BODY, "mix/kernel": (12, 5)}, mix__kernel=None)[1] == {EMBED: 0}
    found = axes({**BODY, "mix/kernel": (12, 5)}, mix__kernel=0, embed_tokens__embedding=0)
    assert found == (EMBED, {EMBED: 0, "mix/kernel": 0})


@pytest.mark.parametrize(
    ("named", "error", "says"),
    [
        ({"embed_token__embedding": 0}, ValueError, "is no leaf of the params; .*'embed_tokens/em"),
        ({"embed_tokens__embedding": "0"}, TypeError, "expected the number of its vocabulary"),
        ({"embed_tokens__embedding": True}, TypeError, "expected the number of its vocabulary"),
        ({"embed_tokens__embedding": 2}, ValueError, r"is float32\[12, 8\]; expected an axis"),
        (
            {"embed_tokens__embedding": 0, "layers__0__up__kernel": 0}, ValueError,
            "has 8 entries along axis 0; expected 12",
        ),
    ],
)  # fmt: skip
def test_what_the_caller_says_is_checked(named, error, says):
    with pytest.raises(error, match=f"^grow_vocabulary: .*{says}"):
        axes(BODY, **named)


def test_two_tables_that_could_be_it():
    two = {"a/embedding": (12, 8), "b/embedding": (12, 8)}
    with pytest.raises(ValueError, match="could be 'a/embedding', 'b/embedding'; say which"):
        axes(two)
