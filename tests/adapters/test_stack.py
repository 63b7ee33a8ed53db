"""stack, put and select: adapters of several forms in slots, replaced there, served by slot."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import arithmetic
from flax_tied_lora.names import names_of
from flax_tied_lora.peft import load_adapter
from tests.helpers.small_adapters import draw, factors, put, tied_factors
from tests.helpers.small_models import TOKENS, WIDTH, TiedLM, init, wrapped

TABLE, UP = "embed_tokens/embedding", "up/kernel"
BOTH = ["embed_tokens", "up"]
MODEL = TiedLM()
PARAMS = init(MODEL)
ROWS = np.resize(TOKENS, (6, 3)) + np.arange(6, dtype=np.int32)[:, None] % 3
NONE = -1


def logits(params: Any, tokens: Any) -> Any:
    return MODEL.apply({"params": params}, tokens)


apply = tied_lora.adapt(logits, on_dense="error")
# Compiled once for a structure: what the slots hold is data.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
run = compiled(tied_lora.per_example(apply))
plain = compiled(logits)


def one(seed: int, targets: Any = BOTH, **options: Any) -> tied_lora.Adapted:
    return wrapped(PARAMS, targets, seed=seed, **options)


@functools.cache
def several() -> tuple[tied_lora.Adapted, ...]:
    """Ranks, alphas and targets of all sorts."""
    return (
        one(1),
        one(2, r=4, lora_alpha=9),
        one(3, ["up"], r=3),
        one(4, ["embed_tokens"], r=5),
    )


def check_slots(stacked: tied_lora.Adapted, slots: list[int], expected: list[Any]) -> None:
    """Checks that each row of tokens gets what its own adapter alone gives, or the base."""
    filled = slots + [NONE] * (len(ROWS) - len(slots))  # of one length: compiled once
    found = run(tied_lora.select(stacked, filled), ROWS)
    for row, own, logits_of_row in zip(ROWS, expected, found, strict=False):
        params = PARAMS if own is None else tied_lora.merge(own)
        np.testing.assert_allclose(logits_of_row, plain(params, row[None])[0], atol=2e-5)


def test_ranks_and_targets_differ():
    own = several()
    stacked = tied_lora.stack(own)
    assert {a.key: a.rank for _, a in stacked.plan.adapters()} == {TABLE: 5, UP: 4}
    assert stacked.plan.config.r == 5
    check_slots(stacked, [3, 2, NONE, 0, 1, 3], [own[3], own[2], None, own[0], own[1], own[3]])


def test_empty_slots_adapt_nothing():
    own = several()[:2]
    stacked = tied_lora.stack(own, capacity=4, rank=6)
    assert {a.key: a.rank for _, a in stacked.plan.adapters()} == {TABLE: 6, UP: 6}
    check_slots(stacked, [2, 1, 3, 0], [None, own[1], None, own[0]])


def test_rank_is_limited_by_the_matrix():
    stacked = tied_lora.stack([one(1)], rank=64)
    assert {a.rank for _, a in stacked.plan.adapters()} == {WIDTH}


def test_put_replaces_fills_and_empties():
    own = several()
    stacked = tied_lora.stack(own[:2], capacity=4, rank=6)
    changed = tied_lora.put(stacked, 0, own[2])  # leaves the table alone
    changed = tied_lora.put(changed, np.int32(3), own[3])
    changed = tied_lora.put(changed, 1, None)
    check_slots(changed, [0, 1, 2, 3], [own[2], None, None, own[3]])
    check_slots(stacked, [0, 1, 2, 3], [own[0], own[1], None, None])  # as it was
    assert jax.tree.structure(changed) == jax.tree.structure(stacked)
    for new, old in zip(jax.tree.leaves(changed), jax.tree.leaves(stacked), strict=True):
        assert (new.shape, new.dtype, new.sharding) == (old.shape, old.dtype, old.sharding)


def test_put_under_jit_at_a_traced_slot():
    own = several()
    stacked = tied_lora.stack(own[:2], rank=5)
    changed = jax.jit(tied_lora.put)(stacked, 1, own[3])
    check_slots(changed, [1, 0], [own[3], own[0]])


def test_nothing_is_traced_again():
    traces = []

    def counted(params, tokens):
        traces.append(tokens.shape)
        return logits(params, tokens)

    serve = compiled(tied_lora.per_example(tied_lora.adapt(counted)))
    own = several()
    stacked = tied_lora.stack(own[:2], capacity=3, rank=6)
    serve(tied_lora.select(stacked, [0, 1]), ROWS[:2])
    for slots in ([1, 1], np.array([2, -1]), jnp.array([0, 2])):
        for other in (None, *own):
            stacked = tied_lora.put(stacked, 2, other)
            serve(tied_lora.select(stacked, slots), ROWS[:2])
    serve(tied_lora.select(arithmetic.scale(stacked, 0.5), [0, 1]), ROWS[:2])
    assert traces == [(1, 3)]


def test_one_slot_for_a_whole_batch():
    own = several()
    stacked = tied_lora.stack(own)
    serve = compiled(lambda s, slot: apply(tied_lora.select(s, slot), TOKENS))
    for slot in range(4):
        expected = plain(tied_lora.merge(own[slot]), TOKENS)
        np.testing.assert_allclose(serve(stacked, slot), expected, atol=2e-5)
    np.testing.assert_allclose(serve(stacked, -1), plain(PARAMS, TOKENS), atol=2e-5)
    # What is traced cannot be refused: nobody gets another's adapter.
    np.testing.assert_allclose(serve(stacked, 4), plain(PARAMS, TOKENS), atol=2e-5)


def test_selected_adapters_go_through_vmap():
    own = several()
    selected = tied_lora.select(tied_lora.stack(own), [1, 3])
    mapped = jax.vmap(
        lambda adapted, row: apply(adapted, row[None])[0],
        in_axes=(tied_lora.adapter_axes(selected), 0),
    )
    expected = [logits(tied_lora.merge(own[i]), row[None])[0] for i, row in zip([1, 3], ROWS)]  # noqa: B905
    np.testing.assert_allclose(mapped(selected, ROWS[:2]), jnp.stack(expected), atol=2e-5)


# Other kinds of adapters


def test_kinds_side_by_side():
    """LoRA, replaced tokens of different sets, and a full copy, each alone or with factors."""
    own = [
        one(1),
        one(2, ["up"], trainable_token_indices={"embed_tokens": [5, 1]}),
        one(3, BOTH, r=3, trainable_token_indices={"embed_tokens": [2, 5, 7]}),
        one(4, ["up"], modules_to_save=["embed_tokens"]),
    ]
    stacked = tied_lora.stack(own, capacity=5)
    tokens = {a.tokens for _, a in stacked.plan.adapters("trainable_tokens")}
    assert tokens == {(5, 1, 2, 7)}
    order = [1, 2, 3, 4, 0, NONE]
    check_slots(stacked, order, [own[1], own[2], own[3], None, own[0], None])
    changed = tied_lora.put(stacked, 0, own[1])
    check_slots(changed, [0], [own[1]])
    check_slots(tied_lora.put(changed, 3, None), [3, 0], [None, own[1]])


DIVERGED: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rows": {"trainable_token_indices": {"embed_tokens": [5, 1]}},
    "copy": {"targets": ["up"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", DIVERGED)
def test_what_has_diverged_reaches_no_other_slot(kind, value):
    """No other's adapter, no base, and no gradient; with slots known and traced."""
    own = one(1, **DIVERGED[kind])
    diverged = own.replace(adapters=jax.tree.map(lambda x: x + value, own.adapters))
    stacked = tied_lora.stack([diverged, own, diverged])
    check_slots(stacked, [1, NONE], [own, None])
    served = compiled(lambda s, slot: apply(tied_lora.select(s, slot), TOKENS))
    for slot, expected in ((1, tied_lora.merge(own)), (NONE, PARAMS), (3, PARAMS), (-7, PARAMS)):
        np.testing.assert_allclose(served(stacked, slot), plain(expected, TOKENS), atol=2e-5)

    def loss(adapted, slots):
        return jnp.sum(tied_lora.per_example(apply)(tied_lora.select(adapted, slots), ROWS[:2]))

    grads = jax.jit(tied_lora.value_and_grad(loss))(stacked, jnp.array([1, 4]))[1]
    for x in jax.tree.leaves(grads):
        assert np.all(np.isfinite(x))
        assert not np.any(x[0::2])


def test_dora_and_none():
    own = [one(1, use_dora=True), one(2, ["up"], r=3, use_dora=True)]
    stacked = tied_lora.stack(own, capacity=3)
    check_slots(stacked, [1, 0, 2, NONE], [own[1], own[0], None, None])


def test_separate_adapters_of_lookup_and_head():
    sites = tied_lora.trace(MODEL.apply, {"params": PARAMS}, TOKENS)
    with pytest.warns(tied_lora.WeightTyingWarning, match="adapter of its own"):
        untied = one(1, ["embed_tokens"], ensure_weight_tying=False, sites=sites)
    own = [untied, one(2, r=3, sites=sites)]
    stacked = tied_lora.stack(own)
    found = run(tied_lora.select(stacked, [0, 1]), ROWS[:2])
    for i, row in enumerate(ROWS[:2]):
        np.testing.assert_allclose(found[i], compiled(apply)(own[i], row[None])[0], atol=2e-5)


def test_adapters_of_bfloat16_keep_their_values():
    low = one(2)
    low = low.replace(adapters=jax.tree.map(lambda x: x.astype(jnp.bfloat16), low.adapters))
    stacked = tied_lora.stack([one(1), low])
    assert {x.dtype for x in jax.tree.leaves(stacked.adapters)} == {np.dtype(np.float32)}
    check_slots(stacked, [1, 0], [low, one(1)])


def test_the_gradient_goes_to_the_slots_that_were_used():
    stacked = tied_lora.stack(several()[:2], capacity=3)

    def loss(adapted, tokens):
        return jnp.sum(tied_lora.per_example(apply)(tied_lora.select(adapted, [2, 0]), tokens))

    grads = jax.jit(tied_lora.value_and_grad(loss))(stacked, ROWS[:2])[1]["lora"][UP]["lora_a"]
    alone = jax.grad(lambda x: jnp.sum(apply(several()[0].replace(adapters=x), ROWS[1:2])))(
        several()[0].adapters
    )["lora"][UP]["lora_a"]
    np.testing.assert_allclose(grads[0, :, :2], alone, atol=1e-4)
    assert not np.any(grads[1:])


def test_adapters_of_peft_files(tmp_path):
    """Files of other ranks and targets, the table's in both of its PyTorch names."""
    names = names_of(
        None,
        [("embed/embedding", "model.embed_tokens.weight"), ("q/kernel", "model.q_proj.weight")],
        tied={"embed/embedding": ("lm_head",)},
    )
    params = {
        "embed": {"embedding": jnp.asarray(draw(0, 12, 4))},
        "q": {"kernel": jnp.asarray(draw(1, 4, 4))},
    }
    flag = {"ensure_weight_tying": True}
    put(tmp_path / "tied", tied_factors(), target_modules=["embed_tokens"], **flag)
    put(tmp_path / "q", factors("model.q_proj", rank=3), r=3, lora_alpha=9)
    own = [load_adapter(tmp_path / name, params, names) for name in ("tied", "q")]

    def model(params, tokens):
        table = params["embed"]["embedding"]
        return jnp.tanh(table[tokens] @ params["q"]["kernel"]) @ table.T

    stacked = tied_lora.stack(own, capacity=3)
    each = tied_lora.per_example(tied_lora.adapt(model, on_dense="error"))
    found = each(tied_lora.select(stacked, [1, 0, 2]), ROWS[:3])
    for row, merged in enumerate([tied_lora.merge(own[1]), tied_lora.merge(own[0]), params]):
        np.testing.assert_allclose(found[row], model(merged, ROWS[row]), atol=2e-5)
