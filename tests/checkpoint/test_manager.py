"""A run and its checkpoints: resumed bit for bit, saved in the background, rotated."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.saved_model import CONFIG, MODEL, OPTIMIZER, TOKENS

APPLY = tied_lora.adapt(MODEL.apply)


@functools.cache
def base_params():
    return MODEL.init(jax.random.key(0), TOKENS[:1])["params"]


def wrapped(seed=1):
    """An Adapted with factors that are all random."""
    adapted = tied_lora.wrap(base_params(), CONFIG)
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


@functools.partial(jax.jit, donate_argnums=(1, 2))
def train_step(frozen, adapters, state, key, batch):
    """One step; what it is given of adapters and state is gone afterwards."""
    adapted = frozen.replace(adapters=adapters).train(key)

    def loss_fn(adapted):
        logits = APPLY({"params": adapted}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, grads = tied_lora.value_and_grad(loss_fn)(adapted)
    updates, state = OPTIMIZER.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss


def run(adapted, state, rng, first, last, after_step=lambda *_: None):
    """Trains from one step to another; all that a step draws comes from ``rng``."""
    for step in range(first + 1, last + 1):
        rng, key, pick = jax.random.split(rng, 3)
        batch = jnp.take(TOKENS, jax.random.permutation(pick, len(TOKENS))[:4], axis=0)
        frozen = adapted.replace(adapters=None)
        adapters, state, _ = train_step(frozen, adapted.adapters, state, key, batch)
        adapted = adapted.replace(adapters=adapters)
        after_step(step, adapted, state, rng)
    return adapted, state, rng


def start():
    adapted = wrapped()
    return adapted, OPTIMIZER.init(adapted.adapters), jax.random.key(11)


def resume_and_finish(directory):
    """Goes on from the latest step of a run, to its end."""
    with checkpoint.Manager(directory) as manager:
        found = manager.restore(base_params(), opt_state=OPTIMIZER)
    rng = found.extra["rng"]
    return run(found.adapted, found.opt_state, rng, found.step, 10)


def saving_to(manager):
    def after_step(step, adapted, state, rng):
        manager.save(step, adapted, opt_state=state, extra={"rng": rng})

    return after_step


@pytest.mark.usefixtures("standard_promotion")
def test_resuming_is_bit_for_bit_the_run_that_was_never_interrupted(tmp_path):
    whole = run(*start(), 0, 10)
    with checkpoint.Manager(tmp_path, max_to_keep=2) as manager:
        run(*start(), 0, 6, saving_to(manager))
    assert_same(resume_and_finish(tmp_path), whole)
    # And it is a run in which something happens.
    assert not np.array_equal(
        whole[0].adapters["lora"]["embed/embedding"]["lora_b"],
        start()[0].adapters["lora"]["embed/embedding"]["lora_b"],
    )


@pytest.mark.usefixtures("standard_promotion")
def test_resuming_in_a_new_process(tmp_path):
    whole = run(*start(), 0, 10)
    with checkpoint.Manager(tmp_path / "run") as manager:
        run(*start(), 0, 4, saving_to(manager))
    result = tmp_path / "result.npz"
    command = [sys.executable, __file__, str(tmp_path / "run"), str(result)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, check=True, env=env, timeout=120)
    with np.load(result, allow_pickle=False) as file:
        found = [file[name] for name in file.files]
    assert_same(found, plain_arrays(whole))


def plain_arrays(result):
    adapted, state, rng = result
    return [np.asarray(x) for x in jax.tree.leaves((adapted, state, jax.random.key_data(rng)))]


@pytest.mark.usefixtures("standard_promotion")
def test_saving_in_the_background_keeps_the_state_of_the_call(tmp_path):
    adapted, state, rng = start()
    expected = jax.device_get((adapted.adapters, state))
    with checkpoint.Manager(tmp_path) as manager:
        assert manager.save(0, adapted, opt_state=state)
        after, _, _ = run(adapted, state, rng, 0, 5)
        # Donated arrays live on here while Orbax looks at them; on other devices they do not.
        for x in jax.tree.leaves((adapted.adapters, state)):
            x.delete()
        manager.wait_until_finished()
        found = manager.restore(base_params(), opt_state=OPTIMIZER)
    assert_same(jax.device_get((found.adapted.adapters, found.opt_state)), expected)
    assert not np.array_equal(
        after.adapters["lora"]["embed/embedding"]["lora_b"],
        found.adapted.adapters["lora"]["embed/embedding"]["lora_b"],
    )


def test_manager_keeps_the_latest(tmp_path):
    adapteds = {step: wrapped(seed=step) for step in (1, 2, 3, 5)}
    with checkpoint.Manager(tmp_path / "run", max_to_keep=2) as manager:
        assert manager.latest_step() is None
        for step, adapted in adapteds.items():
            assert manager.save(step, adapted)
        with pytest.raises(CheckpointError, match=r"step 5 in .* already exists; save a later one"):
            manager.save(5, adapteds[5])
        manager.wait_until_finished()
        assert manager.all_steps() == [3, 5]
    with checkpoint.Manager(tmp_path / "run") as manager:
        assert manager.latest_step() == 5
        for step in (3, 5):
            found = manager.restore(base_params(), step=step)
            assert found.step == step
            assert_same(found.adapted, adapteds[step])
        assert manager.restore(base_params()).step == 5
    # A step is a checkpoint like any other.
    assert checkpoint.restore(tmp_path / "run" / "3", base_params()).step == 3


def test_orbax_options(tmp_path):
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=2,
        step_prefix="step",
        step_format_fixed_length=4,
        enable_async_checkpointing=False,
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
        max_to_keep=2,
    )
    with checkpoint.Manager(tmp_path, options=options) as manager:
        saved = [
            manager.save(step, wrapped(seed=step), metrics={"loss": abs(step - 2.0)})
            for step in range(7)
        ]
        assert saved == [True, False] * 3 + [True]
        # Step 0 was as good as step 4, and went first.
        assert manager.all_steps() == [2, 4]
        assert_same(manager.restore(base_params(), step=2).adapted, wrapped(seed=2))
    assert (tmp_path / "step_0002").is_dir()


if __name__ == "__main__":
    directory, result = sys.argv[1:]
    np.savez(result, *plain_arrays(resume_and_finish(directory)))
