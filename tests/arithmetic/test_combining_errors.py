"""What cannot be combined: other bases, other groups, other call sites, and DoRA."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import arithmetic
from tests.helpers.adapter_sums import (
    PARAMS,
    SITES,
    STACKED,
    TABLE,
    TIED,
    TIES,
    UP,
    one,
    other_values,
    separate,
)


def other_shapes():
    return {**PARAMS, "up": {**PARAMS["up"], "kernel": jnp.ones((8, 9))}}


TWO = [one(1), one(2)]
ERRORS = {
    "nothing": (([], []), ValueError, "at least one"),
    "one adapted": ((TWO[0], [1]), TypeError, "expected a list of Adapted"),
    "params": (([PARAMS], [1]), TypeError, "combine: expected an Adapted.*got dict"),
    "weights missing": ((TWO, [1.0]), ValueError, "1 weights for 2 adapters"),
    "one weight": ((TWO, 1.0), TypeError, "weights is a float"),
    "weight is text": ((TWO, [1, "a"]), TypeError, "'a'; expected a number"),
    "weight is nan": ((TWO, [1, float("nan")]), ValueError, "nan; expected a finite"),
    "unknown how": ((TWO, [1, 1], "ties"), ValueError, "how='ties'; expected one of 'linear'"),
    "rank of cat": ((TWO, [1, 1], "cat", 3), ValueError, "rank=3 with how='cat'"),
    "rank no int": ((TWO, [1, 1], "svd", 2.0), ValueError, "rank=2.0 .* expected an int"),
    "rank 0": ((TWO, [1, 1], "svd", -1), ValueError, r"rank=-1 .*expected 1 to 8"),
    "rank too large": (
        (TWO, [1, 1], "svd", 9), ValueError, rf"rank=9 for '{TABLE}' \[12, 8\]; expected 1 to 8"
    ),
    "linear of ranks": (
        ([one(1), one(2, r=3)], [1, 1], "linear"), ValueError, rf"'{TABLE}' has the ranks \[2, 3\]"
    ),
    "stacked": (
        ([tied_lora.stack(TWO)], [1]), ValueError, r"is \[2, 12, 2\], expected \[12, 2\].*one by"
    ),
    "dora": (([one(1, ["up"], use_dora=True)], [1]), ValueError, f"'{UP}' is DoRA"),
    "full copy": (
        ([one(1, ["up"], modules_to_save=["embed_tokens"])], [1]), ValueError,
        f"'{TABLE}' is trained in modules_to_save",
    ),
    "rows": (
        ([one(1, ["up"], trainable_token_indices=[3])], [1]), ValueError,
        f"'{TABLE}' is trained in trainable_tokens",
    ),
    "biases": (([one(1, ["up"], bias="all")], [1]), ValueError, "'up/bias' is trained in bias"),
    "pissa": (
        ([one(1, ["up"], init_lora_weights="pissa")], [1]), ValueError, "'pissa' took the first"
    ),
    "other values": (
        ([TWO[0], one(2, params=other_values())], [1, 1]), ValueError,
        f"different bases: '{UP}' has other values",
    ),
    "other shapes": (
        ([one(1, ["embed_tokens"]), one(2, ["embed_tokens"], other_shapes())], [1, 1]),
        ValueError, rf"different bases: '{UP}' is float32\[8, 9\]",
    ),
    "other ties": (
        ([one(1, ["up"], TIED, ties=TIES), one(2, ["up"], TIED)], [1, 1]), ValueError,
        "'tail/kernel' is tied in one of the adapters' bases only",
    ),
    "other exclusions": (
        ([one(1, ["up"]), one(2, ["up"], exclude_modules=["embed_tokens"])], [1, 1]), ValueError,
        r"different exclude_modules, None and \('embed_tokens',\)",
    ),
    "list and regex": (
        ([TWO[0], one(2, ".*up")], [1, 1]), ValueError, r"different target_modules, \(.*'\.\*up'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_combine_errors(case):
    arguments, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        arithmetic.combine(*arguments)


def test_one_group_with_other_axes_is_no_group_of_both():
    turned = dataclasses.replace(SITES, sites=tuple(
        dataclasses.replace(s, rows=s.cols, cols=s.rows) if s.leaf == "lm_head/kernel" else s
        for s in SITES
    ))  # fmt: skip
    adapteds = [one(1, ["lm_head"], STACKED, sites=s) for s in (SITES, turned)]
    with pytest.raises(ValueError, match=r"'lm_head/kernel' is not the same group.*rows \(0,\)"):
        arithmetic.combine(adapteds, [1, 1], "cat")


def test_one_key_for_other_call_sites():
    adapted, other = separate(1), separate(2)
    groups = tuple(
        dataclasses.replace(g, adapters=tuple(
            dataclasses.replace(a, sites=tied_lora.SiteFilter(scope="head")) for a in g.adapters))
        for g in other.plan.groups
    )  # fmt: skip
    other = dataclasses.replace(other, plan=tied_lora.Plan.of(groups, other.plan.config))
    with pytest.raises(ValueError, match=f"'{TABLE}:embed_tokens' is for different call sites"):
        arithmetic.combine([adapted, other], [1, 1], "cat")
