"""The form in which adapters stand side by side: the largest ranks and all tokens."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._adapters.common_plan import common_plan, fitted
from tests.helpers.small_models import TiedLM, init, wrapped

TABLE, UP = "embed_tokens/embedding", "up/kernel"
PARAMS = init(TiedLM())


def of(targets, seed=1, **fields):
    return wrapped(PARAMS, targets, seed=seed, **fields)


def ranks(plan):
    return {a.key: a.rank for _, a in plan.adapters("lora")}


def test_equal_plans_are_their_own():
    plan = of(["up"]).plan
    assert common_plan("stack", [plan, plan]) is plan


def test_the_largest_rank_of_each_and_all_tokens():
    plans = [
        of(["up"], r=4, trainable_token_indices=[3, 1]).plan,
        of(["up"], trainable_token_indices=[1, 7]).plan,
        of(["embed_tokens"], r=3).plan,
    ]
    found = common_plan("stack", plans)
    assert ranks(found) == {UP: 4, TABLE: 3}
    assert found.config.r == 4
    assert [a.tokens for _, a in found.adapters("trainable_tokens")] == [(3, 1, 7)]


def test_a_rank_for_all_as_far_as_a_matrix_goes():
    plan = of(["up", "embed_tokens"]).plan
    assert ranks(common_plan("stack", [plan], rank=64)) == {UP: 8, TABLE: 8}
    with pytest.raises(ValueError, match=r"^put: 'embed_tokens/embedding' has rank 2, more"):
        common_plan("put", [plan], rank=1)


CHANGES = {
    "dora": (True, "is DoRA in one and LoRA in another"),
    "residual": (True, "started from the weight"),
    "members": (("up/kernel",), "is for other leaves of its group"),
    "sites": (tied_lora.SiteFilter(role="lookup"), "is for other call sites"),
    "span": ((0, 0, 4), "is another part of the leaf"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_adapters_of_another_form(field):
    value, says = CHANGES[field]
    plan = of(["up"]).plan
    (group,) = plan.groups
    (adapter,) = group.adapters
    other = dataclasses.replace(group, adapters=(dataclasses.replace(adapter, **{field: value}),))
    with pytest.raises(ValueError, match=f"^stack: 'up/kernel' {says}"):
        common_plan("stack", [plan, tied_lora.Plan.of((other,), plan.config)])


def test_adapters_in_that_form_are_the_same_adapters():
    one = of(["up"], trainable_token_indices=[1])
    roomy = of(["up", "embed_tokens"], r=4, trainable_token_indices=[5, 1]).plan
    adapters, scaling = fitted("stack", one, roomy)
    both = dataclasses.replace(one, adapters=adapters, scaling=scaling, plan=roomy)
    found, expected = tied_lora.merge(both), tied_lora.merge(one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    assert adapters["lora"][UP]["lora_a"].shape == (8, 4)
    assert float(scaling[TABLE]) == 0


def test_no_adapter_in_that_form_changes_nothing():
    plan = of(["up"], trainable_token_indices=[1], modules_to_save=["embed_tokens"][:0]).plan
    adapters, scaling = fitted("stack", None, plan, PARAMS)
    empty = dataclasses.replace(of(["up"]), adapters=adapters, scaling=scaling, plan=plan)
    jax.tree.map(np.testing.assert_array_equal, tied_lora.merge(empty), PARAMS)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"targets": ["embed_tokens"]},
            "no room for 'embed_tokens/embedding' .LoRA, rank 2",
        ),
        ({"targets": ["up"], "r": 3}, r"has rank 3, and there is room for 2.*rank=3\)"),
        (
            {"targets": ["up"], "trainable_token_indices": [2]},
            r"replaces token 2, and there is room for tokens \[1\]",
        ),
    ],
)
def test_what_there_is_no_room_for(fields, says):
    room = of(["up"], trainable_token_indices=[1]).plan
    with pytest.raises(ValueError, match=f"^put: .*{says}"):
        fitted("put", of(**fields), room)
