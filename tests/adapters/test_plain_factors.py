"""arithmetic.plain: the merged params stay; factors of one rank and scaling 1 are all there is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import arithmetic
from tests.helpers.adapter_sums import (
    BOTH,
    PARAMS,
    SITES,
    STACKED,
    TABLE,
    TIED,
    TIES,
    UP,
    close,
    flax_logits,
    one,
    separate,
)


def check(adapted, rank, base_params=None):
    """Fails unless the plain form is plain, and merges to the same."""
    plain = arithmetic.plain(adapted, base_params)
    close(tied_lora.merge(plain), tied_lora.merge(adapted))
    assert set(plain.adapters) == {"lora"}
    assert {a.rank for _, a in plain.plan.adapters()} == {rank}
    assert {float(x) for x in plain.scaling.values()} == {1.0}
    config = plain.plan.config
    assert (config.r, config.lora_alpha, config.use_rslora) == (rank, rank, False)
    assert not config.rank_pattern
    assert not config.alpha_pattern
    return plain


KINDS = {
    "alpha": ({"lora_alpha": 7}, 4),
    "rslora": ({"use_rslora": True}, 4),
    "patterns": ({"rank_pattern": {"up": 2}, "alpha_pattern": {"embed_tokens": 32}}, 4),
    "tokens": ({"targets": ["up"], "trainable_token_indices": [5, 1, 7]}, 4),
    "tokens and factors": ({"trainable_token_indices": [5, 1, 7, 2, 9]}, 9),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_function(kind, tied):
    options, rank = KINDS[kind]
    options = {"r": 4, **options}
    adapted = one(**options, **({"params": TIED, "ties": TIES} if tied else {}))
    plain = check(adapted, rank)
    if not tied:
        close(flax_logits(plain), flax_logits(adapted))


def test_a_scaled_adapter():
    check(arithmetic.scale(one(r=4), {"up": -0.25}), 4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factors_that_started_from_the_weight_are_over_what_it_was(init, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    adapted = one(targets=["up"], params=params, r=3, init_lora_weights=init)
    plain = arithmetic.plain(adapted, params)
    assert plain.plan.config.r == 6
    assert plain.params["up"]["kernel"] is params["up"]["kernel"]
    found, expected = (tied_lora.merge(x, dtype=jnp.float32) for x in (plain, adapted))
    bound = 2e-5 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found["up"]["kernel"], expected["up"]["kernel"], atol=bound)


def test_stacked_layers_parts_and_separate_adapters():
    check(one(targets=["kernel"], params=STACKED, sites=SITES, r=2, use_rslora=True), 2)
    fused = one(targets=["up"], r=2, parts={"up": (1, {"a": 4, "b": 4})}, rank_pattern={"up:b": 3})
    assert len(check(fused, 3).adapters["lora"]) == 2
    apart = arithmetic.plain(separate(1, r=2, lora_alpha=3))
    assert set(apart.adapters["lora"]) == {f"{TABLE}:embed_tokens", f"{TABLE}:lm_head"}


def test_an_output_projection_whose_tokens_are_columns():
    params = {"lm_head": {"kernel": PARAMS["embed_tokens"]["embedding"].T}}
    config = tied_lora.LoraConfig(trainable_token_indices={"lm_head": [3, 1]})
    adapted = tied_lora.wrap(params, config)
    check(adapted.replace(adapters=jax.tree.map(lambda x: x + 1.5, adapted.adapters)), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["up"], "use_dora": True}, f"{UP!r} is DoRA .*save_merged"),
        ({"targets": ["up"], "modules_to_save": ["embed_tokens"]},
         f"{TABLE!r} is trained in full .modules_to_save.*save_merged"),
        ({"targets": ["up"], "init_lora_weights": "pissa"},
         "is a residual; pass base_params=, the params that you gave to wrap"),
    ],
)  # fmt: skip
def test_what_no_factors_are_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.plain(one(**options))


def test_other_base_params_are_refused():
    adapted = one(targets=["up"], r=2, init_lora_weights="pissa")
    other = {**PARAMS, "up": {**PARAMS["up"], "kernel": PARAMS["up"]["kernel"] * 1.1}}
    with pytest.raises(ValueError, match="differ from it by more than rank 2"):
        arithmetic.plain(adapted, other)
    with pytest.raises(ValueError, match="found nothing there in base_params"):
        arithmetic.plain(adapted, {"embed_tokens": PARAMS["embed_tokens"]})


def test_it_takes_one_adapter():
    with pytest.raises(TypeError, match="plain"):
        arithmetic.plain(PARAMS)
    with pytest.raises(ValueError, match="one by one"):
        arithmetic.plain(tied_lora.stack([one(1), one(2)]))
    assert BOTH
