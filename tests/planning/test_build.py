"""Plans of groups: what goes before what, one rank for each name, and kinds that exclude others."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig

TABLE = jnp.ones((12, 8))
PARAMS = {
    "embed_tokens": {"embedding": TABLE},
    "up": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
    "norm": {"scale": jnp.ones(8), "bias": jnp.ones(8)},
}
TIED = {**PARAMS, "lm_head": {"kernel": TABLE.T}}
TIES = [("embed_tokens/embedding", "lm_head/kernel")]


def plan(*targets, params=PARAMS, ties="auto", **fields):
    config = LoraConfig(**{"r": 2, "target_modules": list(targets) or None, **fields})
    return tied_lora.wrap(params, config, ties=ties).plan


def kinds(found):
    return sorted((a.kind, a.key) for _, a in found.adapters())


def test_a_full_copy_goes_before_factors():
    assert kinds(plan("embed_tokens", "up", modules_to_save=["up"])) == [
        ("lora", "embed_tokens/embedding"),
        ("modules_to_save", "up/bias"),
        ("modules_to_save", "up/kernel"),
    ]
    with pytest.raises(
        ValueError, match=r"wrap: all that target_modules=\S+ names is in modules_t"
    ):
        plan("up", modules_to_save=["up"])


@pytest.mark.parametrize(
    ("bias", "biases"),
    [("none", set()), ("lora_only", {"up/bias"}), ("all", {"up/bias", "norm/bias"})],
)
def test_which_biases_are_trained(bias, biases):
    found = plan("up", bias=bias)
    assert {key for kind, key in kinds(found) if kind == "bias"} == biases


def test_names_of_one_group_have_one_rank_and_alpha():
    both = ("embed_tokens", "lm_head")
    same = dict.fromkeys(both, 3)
    found = plan(*both, params=TIED, ties=TIES, rank_pattern=same)
    assert [a.rank for _, a in found.adapters()] == [3]
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(
            ValueError, match="is one tie group, and the patterns give it different"
        ):
            plan(*both, params=TIED, ties=TIES, **{field: {"lm_head": 3}})


def test_a_group_that_is_tied_and_not_adapted_is_in_the_plan():
    found = plan("up", params=TIED, ties=TIES)
    assert [(g.key, len(g.adapters)) for g in found.groups] == [
        ("embed_tokens/embedding", 0), ("up/kernel", 1),
    ]  # fmt: skip
    assert [g.key for g in found.adapted] == ["up/kernel"]


def test_ranks_that_a_matrix_cannot_have():
    assert [a.rank for _, a in plan("up", r=6).adapters()] == [6]
    with pytest.raises(
        ValueError, match=r"rank 7 for 'up/kernel' float32\[8, 6\], which has rank 6"
    ):
        plan("up", r=7)
    with pytest.raises(
        ValueError, match=r"rank 4 for 'up/kernel:a' float32\[8, 3\], which has rank 3"
    ):
        plan("up:a", r=4, parts={"up": (1, ["a", "b"])})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"target_modules": ["up"], "modules_to_save": ["embed_tokens"],
             "trainable_token_indices": [1]},
            "modules_to_save and trainable_token_indices, and a full copy has all rows",
        ),
        (
            {"target_modules": ["embed_tokens"], "use_dora": True, "trainable_token_indices": [1]},
            "target_modules and trainable_token_indices, and use_dora scales every row",
        ),
        (
            {"target_modules": ["up:a"], "use_dora": True, "parts": {"up": (1, ["a", "b"])}},
            "use_dora scales all of 'up/kernel', and parts gives each of its parts factors",
        ),
    ],
)  # fmt: skip
def test_kinds_that_exclude_one_another(fields, says):
    with pytest.raises(ValueError, match=says):
        plan(**fields)
