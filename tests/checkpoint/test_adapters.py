"""One checkpoint: what goes in comes out, whatever it is saved with."""

from __future__ import annotations

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import freeze
from flax.training.train_state import TrainState

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora._tree.paths import TiedLeaf, flatten
from tests.helpers.saved_model import (
    OPTIMIZER,
    TIES,
    TOKENS,
    VOCAB,
    WIDTH,
    assert_same,
    base_params,
    tied_params,
    wrapped,
)

# One checkpoint


def test_round_trip(tmp_path):
    params = tied_params()
    adapted = wrapped(params, ties=TIES).train(jax.random.key(4))
    state = OPTIMIZER.init(adapted.adapters)
    extra = {"position": 17, "seen": np.arange(3), "nested": [1.5, (True, None)]}
    checkpoint.save(tmp_path / "a", adapted, opt_state=state, step=7, extra=extra)
    restored = checkpoint.restore(tmp_path / "a", params, opt_state=OPTIMIZER, extra=extra)
    assert_same(restored.adapted, adapted)
    assert restored.adapted.plan is adapted.plan
    assert_same(restored.opt_state, state)
    assert_same(restored.extra, extra)
    assert restored.step == 7
    leaves, _ = flatten(restored.adapted.params)
    assert leaves["embed/embedding"] is params["embed"]["embedding"]
    assert leaves["second/embedding"] == TiedLeaf("embed/embedding")
    assert leaves["head/kernel"] == TiedLeaf("embed/embedding", transposed=True)


def test_params_may_have_lost_their_tie_or_still_be_stored_once(tmp_path):
    adapted = wrapped(tied_params(), ties=TIES)
    checkpoint.save(tmp_path / "a", adapted)
    copies = jax.tree.map(lambda x: x + 0, tied_params())
    for params in (copies, jax.tree.map(np.asarray, copies), adapted.params, freeze(copies)):
        restored = checkpoint.restore(tmp_path / "a", params).adapted
        assert_same(restored.adapters, adapted.adapters)
        assert len(jax.tree.leaves(restored.params)) == 3


def test_what_was_not_saved_or_not_asked_for_is_none(tmp_path):
    adapted = wrapped()
    checkpoint.save(tmp_path / "a", adapted, opt_state=OPTIMIZER.init(adapted.adapters))
    restored = checkpoint.restore(tmp_path / "a", base_params())
    assert (restored.opt_state, restored.step, restored.extra) == (None, 0, None)
    assert restored.adapted.rng is None


def test_states_and_extras_without_arrays(tmp_path):
    adapted = wrapped()
    state = optax.sgd(0.1).init(adapted.adapters)
    checkpoint.save(tmp_path / "a", adapted, opt_state=state, extra={})
    restored = checkpoint.restore(tmp_path / "a", base_params(), opt_state=optax.sgd(0.1))
    assert_same(restored.opt_state, state)
    assert restored.extra == {}


def test_factors_keep_their_dtype_and_scaling_its_value(tmp_path):
    adapted = wrapped()
    adapted = adapted.replace(
        adapters=jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapted.adapters),
        scaling=jax.tree.map(lambda x: x * 3, adapted.scaling),
    )
    checkpoint.save(tmp_path / "a", adapted)
    assert_same(checkpoint.restore(tmp_path / "a", base_params()).adapted, adapted)


def test_further_collections_of_adapters(tmp_path):
    adapted = wrapped()
    more = {**adapted.adapters, "mine": {"embed/embedding": {"rows": jnp.ones((2, 3))}}}
    adapted = adapted.replace(adapters=more)
    checkpoint.save(tmp_path / "a", adapted)
    assert_same(checkpoint.restore(tmp_path / "a", base_params()).adapted, adapted)


def test_random_keys(tmp_path):
    extra = {
        "key": jax.random.key(1),
        "rbg": jax.random.key(2, impl="rbg"),
        "many": jax.random.split(jax.random.key(3), 4),
        "old": jax.random.PRNGKey(5),
    }
    checkpoint.save(tmp_path / "a", wrapped(), extra=extra)
    without_template = checkpoint.restore(tmp_path / "a", base_params())
    assert_same(without_template.extra, extra)
    abstract = jax.eval_shape(lambda: extra)
    assert_same(checkpoint.restore(tmp_path / "a", base_params(), extra=abstract).extra, extra)


def test_extra_without_template_comes_in_dicts_and_lists(tmp_path):
    extra = {"pair": (jnp.ones(2), 3), "none": None, "a/b": np.float32(2)}
    checkpoint.save(tmp_path / "a", wrapped(), extra=extra)
    found = checkpoint.restore(tmp_path / "a", base_params()).extra
    assert_same(found, {"pair": [jnp.ones(2), 3], "none": None, "a/b": np.asarray(np.float32(2))})


def test_boxes(tmp_path):
    init = nn.with_partitioning(nn.initializers.normal(), ("vocab", "embed"))
    boxed = nn.Embed(VOCAB, WIDTH, embedding_init=init).init(jax.random.key(0), TOKENS)["params"]
    config = tied_lora.LoraConfig(r=2, target_modules=["embedding"])
    adapted = tied_lora.wrap(boxed, config)
    state = OPTIMIZER.init(adapted.adapters)
    checkpoint.save(tmp_path / "a", adapted, opt_state=state)
    restored = checkpoint.restore(tmp_path / "a", boxed, opt_state=OPTIMIZER)
    assert_same(restored.adapted, adapted)
    assert restored.adapted.adapters["lora"]["embedding"]["lora_a"].names == ("vocab", None)
    assert_same(restored.opt_state, state)
    plain = checkpoint.restore(tmp_path / "a", nn.meta.unbox(boxed), opt_state=OPTIMIZER)
    assert_same(plain.adapted.adapters, nn.meta.unbox(adapted.adapters))


def test_abstract_base(tmp_path):
    adapted = wrapped()
    checkpoint.save(tmp_path / "a", adapted)
    abstract = jax.eval_shape(base_params)
    restored = checkpoint.restore(tmp_path / "a", abstract).adapted
    assert_same(restored.adapters, adapted.adapters)
    assert isinstance(restored.params["dense"]["kernel"], jax.ShapeDtypeStruct)


def test_another_base_where_asked_for(tmp_path):
    adapted = wrapped()
    checkpoint.save(tmp_path / "a", adapted)
    other = jax.tree.map(lambda x: (x + 1).astype(jnp.bfloat16), base_params())
    restored = checkpoint.restore(tmp_path / "a", other, check_base=False).adapted
    assert_same(restored.adapters, adapted.adapters)
    assert {g.dtype for g in restored.plan.groups} == {"bfloat16"}
    assert tied_lora.merge(restored)["dense"]["kernel"].dtype == jnp.bfloat16


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    checkpoint.save(tmp_path / "a", wrapped(), extra=[1, np.ones(2)])
    checkpoint.restore(tmp_path / "a", base_params())


def test_orbax_alone_reads_the_files(tmp_path):
    adapted = wrapped()
    checkpoint.save(tmp_path / "a", adapted)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "a" / "adapted")
    assert_same(found, {"adapters": adapted.adapters, "scaling": adapted.scaling})


def test_variables_saved_with_orbax_by_hand(tmp_path):
    adapted = wrapped(tied_params(), ties=TIES)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "v", adapted.variables())
        checkpointer.wait_until_finished()
        blank = jax.tree.map(jnp.zeros_like, adapted.variables())
        found = checkpointer.restore(tmp_path / "v", blank)
    restored = tied_lora.Adapted.from_variables(found, adapted.plan)
    assert_same(restored, adapted)


# Adam relies on JAX's usual promotion.
@pytest.mark.usefixtures("standard_promotion")
def test_train_state(tmp_path):
    adapted = wrapped()
    state = TrainState.create(apply_fn=None, params=adapted.adapters, tx=OPTIMIZER)
    state = jax.jit(lambda s: s.apply_gradients(grads=s.params))(state)
    now = adapted.replace(adapters=state.params)
    checkpoint.save(tmp_path / "a", now, opt_state=state.opt_state, step=state.step)
    fresh = TrainState.create(apply_fn=None, params=adapted.adapters, tx=OPTIMIZER)
    found = checkpoint.restore(tmp_path / "a", base_params(), opt_state=fresh.opt_state)
    resumed = fresh.replace(
        params=found.adapted.adapters, opt_state=found.opt_state, step=jnp.int32(found.step)
    )
    assert_same(resumed.params, state.params)
    assert_same(resumed.opt_state, state.opt_state)
    assert int(resumed.step) == int(state.step) == 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "t", state)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "t", state), state)
