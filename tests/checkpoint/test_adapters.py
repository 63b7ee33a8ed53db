"""One checkpoint: round trips, and other shardings."""

from __future__ import annotations

import functools
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

VOCAB, WIDTH = 32, 16


class Model(nn.Module):
    """An embedding that is its own head, with a layer between."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        return embed.attend(nn.tanh(nn.Dense(WIDTH, name="dense")(embed(tokens))))


MODEL = Model()
TOKENS = jax.random.randint(jax.random.key(9), (64, 8), 0, VOCAB)
CONFIG = tied_lora.LoraConfig(r=2, target_modules=["embed", "dense"], lora_dropout=0.1)
OPTIMIZER = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.05, 3, 20))


@functools.cache
def base_params():
    return MODEL.init(jax.random.key(0), TOKENS[:1])["params"]


def tied_params():
    """Params in which the table stands three times: twice as it is, once transposed."""
    table = base_params()["embed"]["embedding"]
    tied = {"second": {"embedding": table}, "head": {"kernel": table.T}}
    return {**base_params(), **tied}


TIES = [("embed/embedding", "head/kernel")]


def wrapped(params=None, seed=1, **kwargs):
    """An Adapted with factors that are all random, as if trained."""
    params = base_params() if params is None else params
    adapted = tied_lora.wrap(params, CONFIG, **kwargs)
    leaves, treedef = jax.tree.flatten(adapted.adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return adapted.replace(adapters=jax.tree.unflatten(treedef, noise))


def assert_same(found, expected):
    """The same structure, types and bits; typed random keys of the same implementation."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


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


# Other shardings


def mesh_of(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2)


def table_spec(x):
    return jax.P("x", "y") if x.ndim == 2 else jax.P()


@pytest.fixture(params=[jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def mesh(request):
    return mesh_of(request.param)


def sharded(params, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, table_spec(x))), params)


def test_factors_follow_their_leaf_onto_a_mesh(tmp_path, mesh):
    adapted = wrapped()
    state = OPTIMIZER.init(adapted.adapters)
    checkpoint.save(tmp_path / "a", adapted, opt_state=state)
    params = sharded(base_params(), mesh)
    restored = checkpoint.restore(tmp_path / "a", params, opt_state=OPTIMIZER)
    fresh = tied_lora.wrap(params, CONFIG)
    for tree in (restored.adapted.adapters, restored.opt_state[0].mu, restored.opt_state[0].nu):
        jax.tree.map(lambda x, y: _assert_placed(x, y.sharding), tree, fresh.adapters)
    assert_same(jax.device_get(restored.adapted.adapters), jax.device_get(adapted.adapters))
    assert_same(jax.device_get(restored.opt_state), jax.device_get(state))


def _assert_placed(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


def test_from_a_mesh_to_one_device_and_to_another_mesh(tmp_path, mesh):
    adapted = wrapped(sharded(base_params(), mesh))
    checkpoint.save(tmp_path / "a", adapted, opt_state=OPTIMIZER.init(adapted.adapters))
    restored = checkpoint.restore(tmp_path / "a", base_params(), opt_state=OPTIMIZER)
    for x in jax.tree.leaves((restored.adapted.adapters, restored.opt_state)):
        assert len(x.sharding.device_set) == 1
        assert not x.committed
    assert_same(jax.device_get(restored.adapted.adapters), jax.device_get(adapted.adapters))
    other = jax.make_mesh((2, 4), ("x", "y"), axis_types=mesh.axis_types)
    restored = checkpoint.restore(tmp_path / "a", adapted.params, sharding=other)
    factor = restored.adapted.adapters["lora"]["embed/embedding"]["lora_a"]
    _assert_placed(factor, jax.NamedSharding(other, jax.P("x", None)))
    assert_same(jax.device_get(restored.adapted.adapters), jax.device_get(adapted.adapters))


def test_shardings_as_asked(tmp_path, mesh):
    adapted = wrapped()
    checkpoint.save(tmp_path / "a", adapted)
    everywhere = jax.NamedSharding(mesh, jax.P())
    rows = jax.NamedSharding(mesh, jax.P(None, "y"))

    def place(x):
        return rows if x.shape[1] % 2 == 0 else everywhere

    each = jax.tree.map(place, adapted.adapters)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), adapted.adapters
    )
    for asked, expected in (
        (everywhere, jax.tree.map(lambda x: everywhere, adapted.adapters)),
        (each, each),
        (each["lora"], each),
        (abstract, each),
        (mesh, jax.tree.map(lambda x: everywhere, adapted.adapters)),
    ):
        found = checkpoint.restore(tmp_path / "a", base_params(), sharding=asked).adapted
        jax.tree.map(_assert_placed, found.adapters, expected)
        assert_same(jax.device_get(found.adapters), jax.device_get(adapted.adapters))


def test_a_mesh_and_the_names_of_boxes(tmp_path):
    mesh = mesh_of(jax.sharding.AxisType.Auto)
    init = nn.with_partitioning(nn.initializers.normal(), ("x", "logical"))
    boxed = nn.Embed(VOCAB, WIDTH, embedding_init=init).init(jax.random.key(0), TOKENS)["params"]
    adapted = tied_lora.wrap(boxed, tied_lora.LoraConfig(r=2, target_modules=["embedding"]))
    checkpoint.save(tmp_path / "a", adapted)
    found = checkpoint.restore(tmp_path / "a", boxed, sharding=mesh).adapted
    factors = found.adapters["lora"]["embedding"]
    _assert_placed(factors["lora_a"].value, jax.NamedSharding(mesh, jax.P("x", None)))
    _assert_placed(factors["lora_b"].value, jax.NamedSharding(mesh, jax.P()))
