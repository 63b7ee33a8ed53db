"""``merge(untie=...)``: where the parts of a table with separate adapters go."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

import flax_tied_lora as tied_lora
from tests.planning.test_tying import HEAD, TABLE, W, one_leaf, separate, stacks, two_leaves


def delta(own, name):
    pair = own.adapters["lora"][f"{TABLE}:{name}"]
    return 1.5 * np.asarray(pair["lora_a"]) @ np.asarray(pair["lora_b"])


def both():
    return one_leaf(["embed_tokens", "lm_head"])


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_new_kernel_is_the_transpose_of_the_table():
    own = both()
    merged = tied_lora.merge(own, untie={"lm_head": HEAD})
    assert_close(merged["embed_tokens"]["embedding"], W + delta(own, "embed_tokens"))
    assert_close(merged["lm_head"]["kernel"], (W + delta(own, "lm_head")).T)


def test_a_new_leaf_of_another_name_lies_as_the_table_does():
    own = both()
    merged = tied_lora.merge(own, untie={"lm_head": "head/deep/embedding"})
    assert_close(merged["head"]["deep"]["embedding"], W + delta(own, "lm_head"))


def test_either_part_may_go():
    own = both()
    merged = tied_lora.merge(own, untie={"embed_tokens": "input/embedding"})
    assert_close(merged["input"]["embedding"], W + delta(own, "embed_tokens"))
    assert_close(merged["embed_tokens"]["embedding"], W + delta(own, "lm_head"))


def test_the_part_without_an_adapter_may_go():
    own = one_leaf(["lm_head"])
    merged = tied_lora.merge(own, untie={"embed_tokens": "input/embedding"})
    np.testing.assert_array_equal(merged["input"]["embedding"], W)
    assert_close(merged["embed_tokens"]["embedding"], W + delta(own, "lm_head"))


def test_an_existing_member_keeps_its_layout():
    own = two_leaves(["embed_tokens", "lm_head"])
    merged = tied_lora.merge(own, untie={"lm_head": HEAD})
    assert_close(merged["embed_tokens"]["embedding"], W + delta(own, "embed_tokens"))
    assert_close(merged["lm_head"]["kernel"], (W + delta(own, "lm_head")).T)


def test_dtype_and_containers():
    own = both()
    frozen = own.replace(params=freeze(own.params))
    merged = tied_lora.merge(frozen, dtype=jnp.bfloat16, untie={"lm_head": HEAD})
    assert isinstance(merged, FrozenDict)
    assert merged["lm_head"]["kernel"].dtype == jnp.bfloat16


def test_the_adapted_stays_as_it_was():
    own = both()
    untie = {"lm_head": HEAD}
    tied_lora.merge(own, untie=untie)
    assert untie == {"lm_head": HEAD}
    assert set(own.params) == {"embed_tokens"}


@pytest.mark.parametrize(
    ("untie", "message"),
    [
        (None, rf"'{TABLE}' has separate adapters for 'embed_tokens', 'lm_head', which one array "
               r"cannot hold.*untie=\{\"lm_head\": \"path/of/leaf\"\}"),
        ({}, "has separate adapters"),
        ({"head": HEAD}, "has separate adapters for 'embed_tokens', 'lm_head'"),
        ({"lm_head": HEAD, "q_proj": "q/kernel"}, "untie names 'q_proj', for which there is no"),
        ({"lm_head": TABLE}, f"untie={{'lm_head': '{TABLE}'}}; expected another path"),
        ({"lm_head": "embed_tokens"}, "new leaf at 'embed_tokens', where another leaf is"),
        ({"lm_head": f"{TABLE}/kernel"}, f"new leaf at '{TABLE}/kernel', where another"),
        ({"lm_head": HEAD, "embed_tokens": HEAD}, f"'{HEAD}' twice"),
    ],
)  # fmt: skip
def test_errors(untie, message):
    with pytest.raises(ValueError, match=message):
        tied_lora.merge(both(), untie=untie)


def test_another_leaf_is_not_written_over():
    own = one_leaf(["lm_head"])
    params = {**own.params, "up": {"kernel": jnp.ones((8, 12))}}
    with pytest.raises(ValueError, match="new leaf at 'up/kernel', where another leaf is in the w"):
        tied_lora.merge(own.replace(params=params), untie={"lm_head": "up/kernel"})


@pytest.mark.parametrize(
    ("untie", "message"),
    [
        (None, "has separate adapters"),
        ({"lm_head": "other/kernel"}, rf"untie={{'lm_head': 'other/kernel'}}; expected .*'{HEAD}'"),
    ],
)
def test_errors_of_members(untie, message):
    with pytest.raises(ValueError, match=message):
        tied_lora.merge(two_leaves(["embed_tokens", "lm_head"]), untie=untie)


def test_untie_of_nothing_separate():
    own = one_leaf(["embed_tokens"], ensure_weight_tying=False)
    tied_own = tied_lora.wrap(
        own.params, tied_lora.LoraConfig(r=2, target_modules=["embed_tokens"])
    )
    with pytest.raises(ValueError, match="untie names 'lm_head', for which there is no separate"):
        tied_lora.merge(tied_own, untie={"lm_head": HEAD})
    with pytest.raises(TypeError, match="untie='lm_head'; expected a dict"):
        tied_lora.merge(own, untie="lm_head")


def test_what_else_is_read_beside_a_scope_is_not_known():
    """The head reads the table, too: it must not get what the decoder's lookups got."""

    def fn(params, x):
        w = params["embed_tokens"]["embedding"]
        return stacks(w, w, w.T, x)

    own = separate({"embed_tokens": {"embedding": W}}, ["encoder/shared", "decoder/shared"], fn)
    with pytest.raises(ValueError, match=r'untie=\{"decoder/shared"'):
        tied_lora.merge(own, untie={"encoder/shared": "encoder/embedding"})
    untie = {f"{n}/shared": f"{n}/embedding" for n in ("encoder", "decoder")}
    merged = tied_lora.merge(own, untie=untie)
    np.testing.assert_array_equal(merged["embed_tokens"]["embedding"], W)
    for name in ("encoder", "decoder"):
        assert_close(merged[name]["embedding"], W + delta(own, f"{name}/shared"))


def test_base_of_separate_adapters_is_the_tied_model():
    np.testing.assert_array_equal(tied_lora.base(both())["embed_tokens"]["embedding"], W)
