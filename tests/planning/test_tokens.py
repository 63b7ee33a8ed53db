"""`trainable_token_indices`: which table a list is for, and rows that tied names share or not."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig

TABLE = jnp.ones((12, 8))
PARAMS = {"embed_tokens": {"embedding": TABLE}, "positions": {"embedding": jnp.ones((5, 8))}}
TIED = {**PARAMS, "lm_head": {"kernel": TABLE.T}}
TIES = [("embed_tokens/embedding", "lm_head/kernel")]
EMBED = "embed_tokens/embedding"


def rows(tokens, params=PARAMS, ties="auto", **fields):
    """Returns the rows that are replaced, by adapter key."""
    config = LoraConfig(r=2, trainable_token_indices=tokens, **fields)
    plan = tied_lora.wrap(params, config, ties=ties).plan
    return {a.key: a.tokens for _, a in plan.adapters("trainable_tokens")}


def test_a_list_is_for_the_input_embedding():
    assert rows([3, 1]) == {EMBED: (3, 1)}
    assert rows([3, 1], TIED, TIES) == {EMBED: (3, 1)}


def test_a_list_where_it_is_not_clear_which_table():
    two = {"a": {"embedding": TABLE}, "b": {"embedding": TABLE + 1}}
    with pytest.raises(ValueError, match=r"the input embedding could be 'a/embedding'"):
        rows([1], two)
    with pytest.raises(ValueError, match="the input embedding could be no table; name it"):
        rows([1], {"up": {"kernel": TABLE}})


def test_a_dict_names_tables():
    assert rows({"positions": [4]}) == {"positions/embedding": (4,)}
    with pytest.raises(ValueError, match="'embedding' in trainable_token_indices means 'embed_t"):
        rows({"embedding": [1]})


def test_names_of_one_group_want_the_same_rows():
    assert rows({"embed_tokens": [3, 1], "lm_head": [1, 3]}, TIED, TIES) == {EMBED: (3, 1)}
    different = {"embed_tokens": [3], "lm_head": [1]}
    with pytest.raises(ValueError, match=r"'embed_tokens': \[3\], 'lm_head': \[1\]\. Give them"):
        rows(different, TIED, TIES)
    apart = rows(different, TIED, TIES, ensure_weight_tying=False)
    assert apart == {f"{EMBED}:embed_tokens": (3,), f"{EMBED}:lm_head": (1,)}


def test_rows_that_a_table_has_not():
    with pytest.raises(ValueError, match=r"\[12\] in trainable_token_indices; .* 0 to 11\. grow"):
        rows([3, 12])
