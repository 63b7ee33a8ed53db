"""What cannot be saved, and checkpoints for something else: each gets a clear error."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.saved_base import base_params, wrapped

OPTIMIZER = optax.adam(0.1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter"
    adapted = wrapped()
    state = OPTIMIZER.init(adapted.adapters)
    checkpoint.save(path, adapted, opt_state=state, extra={"rng": jax.random.key(1)})
    return path


def restore(path, params=None, **kwargs):
    return checkpoint.restore(path, base_params() if params is None else params, **kwargs)


# Nothing to save, or nowhere


class Unfit:
    pass


def donated():
    x = jnp.ones(3)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    return x


@pytest.mark.parametrize(
    ("adapted", "kwargs", "message"),
    [
        (base_params, {}, "adapted is a dict; expected an Adapted"),
        (lambda: tied_lora.stack([wrapped()] * 2), {}, r"lora_a of .* save stacked adapters one"),
        (wrapped, {"step": -1}, "step=-1: ValueError: below 0; expected an int of at least 0"),
        (wrapped, {"step": 1.5}, "step=1.5: TypeError: .*expected an int of at least 0"),
        (wrapped, {"extra": {"text": "x"}}, "extra leaf 'text' is a str; expected an array"),
        (wrapped, {"extra": [np.array(["x"])]}, "extra leaf '0' is of dtype <U1; expected numbers"),
        (wrapped, {"extra": 2**70}, "extra leaf '' is of dtype object; expected numbers"),
        (wrapped, {"opt_state": OPTIMIZER}, "opt_state leaf 'init' is a function; expected an arr"),
        (wrapped, {"opt_state": Unfit()}, "opt_state leaf '' is a Unfit"),
        (wrapped, {"extra": {"x": jax.ShapeDtypeStruct((), int)}}, "'x' is abstract; expected an"),
        (
            wrapped,
            {"extra": {"a.b": 1, "a": {"b": 2}}},
            "two leaves of extra are both named 'a.b' .* rename a key that contains '.'",
        ),
    ],
)
def test_what_cannot_be_saved(tmp_path, adapted, kwargs, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "a", adapted(), **kwargs)
    with (
        checkpoint.Manager(tmp_path / "run") as manager,
        pytest.raises(CheckpointError, match=message),
    ):
        manager.save(**{"step": 3, "adapted": adapted(), **kwargs})
    assert [p.name for p in tmp_path.rglob("*")] == ["run"]


def test_donated_arrays_and_tracers(tmp_path):
    with pytest.raises(CheckpointError, match="'x' is deleted: it was donated"):
        checkpoint.save(tmp_path / "a", wrapped(), extra={"x": donated()})

    wrapped()

    def inside(x):
        checkpoint.save(tmp_path / "a", wrapped(), extra={"x": x})

    with pytest.raises(CheckpointError, match=r"leaf '.*' is a tracer; save outside jax.jit"):
        jax.jit(inside)(jnp.ones(3))
    with pytest.raises(CheckpointError, match=r"params leaf '.*' is a tracer; save outside"):
        jax.jit(lambda params: checkpoint.save_params(tmp_path / "a", params))(base_params())
    assert not list(tmp_path.iterdir())


def test_never_overwrites(saved):
    before = {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match="adapter exists already; name another directory"):
        checkpoint.save(saved, wrapped())
    with pytest.raises(CheckpointError, match="adapter exists already"):
        checkpoint.save_params(saved, base_params())
    assert {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()} == before


def test_steps_go_up(tmp_path):
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(5, wrapped())
        with pytest.raises(CheckpointError, match="step 3 is below step 5, the latest in"):
            manager.save(3, wrapped())
        with pytest.raises(CheckpointError, match=r"step 5 in .*already exists"):
            manager.save(5, wrapped(), force=True)
        with pytest.raises(CheckpointError, match=r"no step 4 in .*, which has \[5\]; name one"):
            manager.restore(base_params(), step=4)
        # As the message says.
        shutil.rmtree(tmp_path / "5")
        assert manager.save(3, wrapped())
        assert manager.all_steps() == [3]


def test_options_twice(tmp_path):
    with pytest.raises(CheckpointError, match="max_to_keep is given beside options"):
        checkpoint.Manager(tmp_path, max_to_keep=1, options=ocp.CheckpointManagerOptions())


# No checkpoint


def test_no_checkpoint(tmp_path, saved):
    with pytest.raises(CheckpointError, match="nowhere does not exist; check the path"):
        restore(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no checkpoint of flax_tied_lora: .*nothing"):
        restore(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"is no checkpoint .*it is a file"):
        restore(tmp_path / "file")
    with (
        checkpoint.Manager(tmp_path / "run") as manager,
        pytest.raises(CheckpointError, match=r"no checkpoint in .*run; save one first"),
    ):
        manager.restore(base_params())
    shutil.copytree(saved, tmp_path / "run" / "7")
    with pytest.raises(CheckpointError, match="holds the steps 7 of a run; open it with Manager"):
        restore(tmp_path / "run")
    (tmp_path / "run" / "8").mkdir()
    with checkpoint.Manager(tmp_path / "run") as manager:
        assert manager.all_steps() == [7]
        with pytest.raises(CheckpointError, match="8 is no checkpoint of flax_tied_lora"):
            manager.restore(base_params(), step=8)
        message = r"step 7 is restored, as step 8 .* cannot be .*8 is no checkpoint .*delete that"
        with pytest.warns(UserWarning, match=message):
            manager.restore(base_params())
        message = r"step 8 .* already exists, and cannot be restored .*8 is no checkpoint .*delete"
        with pytest.raises(CheckpointError, match=message):
            manager.save(8, wrapped())
    shutil.rmtree(tmp_path / "run" / "7")
    with checkpoint.Manager(tmp_path / "run") as manager:
        assert manager.latest_step() is None
        with pytest.raises(CheckpointError, match="8 is no checkpoint of flax_tied_lora"):
            manager.restore(base_params())


def test_adapters_and_params_are_not_mixed_up(tmp_path, saved):
    checkpoint.save_params(tmp_path / "p", base_params())
    with pytest.raises(CheckpointError, match="p holds full params; use restore_params"):
        restore(tmp_path / "p")
    with pytest.raises(CheckpointError, match="adapter holds adapters; use restore"):
        checkpoint.restore_params(saved)


# Other templates


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"opt_state": optax.adamw(optax.constant_schedule(0.1))},
            r"opt_state in .* does not fit: '2\.count' is not in the checkpoint\. .*pass the optim",
        ),
        (
            {"opt_state": optax.sgd(0.1)},
            "opt_state .*'0.count' is only in the checkpoint.*and 6 mo",
        ),
        (
            {"opt_state": optax.adam(0.1, mu_dtype=jnp.bfloat16)},
            r"lora_a' is float32\[16, 2\] in the checkpoint and bfloat16\[16, 2\] as asked for",
        ),
        (
            {"extra": {"rng": 3}},
            r"extra .*'rng' is key<fry>\[\] in the checkpoint and int64\[\] as",
        ),
        ({"extra": {"seed": 3}}, "extra .*'rng' is only in .*'seed' is not in the checkpoint"),
        ({"sharding": "x"}, "adapters cannot be placed: sharding='x'"),
        ({"sharding": {"lora": {}}}, "adapters cannot be placed"),
    ],
)
def test_templates_that_do_not_fit(saved, kwargs, message):
    with pytest.raises(CheckpointError, match=message):
        restore(saved, **kwargs)


def test_items_that_were_not_saved(tmp_path):
    checkpoint.save(tmp_path / "a", wrapped())
    with pytest.raises(
        CheckpointError, match=r"no opt_state in .*, which has adapted; it was saved"
    ):
        restore(tmp_path / "a", opt_state=OPTIMIZER)
    with pytest.raises(CheckpointError, match=r"no extra in .* Leave extra= out"):
        restore(tmp_path / "a", extra={"x": 1})


def test_wide_arrays_are_not_narrowed(tmp_path):
    checkpoint.save(tmp_path / "a", wrapped(), extra={"x": np.ones(2)})
    asked = {"x": jax.ShapeDtypeStruct((2,), np.float64)}
    with pytest.raises(CheckpointError, match=r"'x' is float64.*needs jax_enable_x64, or a NumPy"):
        restore(tmp_path / "a", extra=asked)
