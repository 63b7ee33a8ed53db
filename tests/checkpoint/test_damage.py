"""Checkpoints that are half-written or damaged: none is taken for whole."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError

CONFIG = tied_lora.LoraConfig(r=2, target_modules=["embed", "dense"])
OPTIMIZER = optax.adam(0.1)
TIES = [("embed/embedding", "head/kernel")]

# What Orbax leaves behind when reading a file fails: coroutines that nobody awaits any more.
reads_damaged_files = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited:RuntimeWarning",
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning",
)


@functools.cache
def base_params():
    keys = iter(jax.random.split(jax.random.key(0), 3))
    table = jax.random.normal(next(keys), (512, 16))
    return {
        "embed": {"embedding": table},
        "dense": {"kernel": jax.random.normal(next(keys), (16, 16)), "bias": jnp.zeros(16)},
        "head": {"kernel": table.T},
    }


@functools.cache
def wrapped():
    adapted = tied_lora.wrap(base_params(), CONFIG, ties=TIES)
    return adapted.replace(adapters=jax.tree.map(noise, adapted.adapters))


def noise(x):
    """Random bits, which no compression makes smaller."""
    return jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter"
    adapted = wrapped()
    state = OPTIMIZER.init(adapted.adapters)
    checkpoint.save(path, adapted, opt_state=state, extra={"rng": jax.random.key(1)})
    return path


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "adapter")
    return tmp_path / "adapter"


def restore(path, params=None, **kwargs):
    return checkpoint.restore(path, base_params() if params is None else params, **kwargs)


def edit_record(path, change, fix_checksum=True):
    file = path / "tied_lora" / "metadata"
    content = json.loads(file.read_text())
    change(content["record"])
    if fix_checksum:
        text = json.dumps(content["record"], sort_keys=True)
        content["crc32"] = zlib.crc32(text.encode())
    file.write_text(json.dumps(content))


# Writing that fails half-way


@contextlib.contextmanager
def full_disk(tmp_path):
    """A disk that is full when all is written; yields the names that were there then."""
    names = set()
    path_type = type(epath.Path(tmp_path))
    write_text = path_type.write_text

    def fail(self, directory):
        names.update(path.name for path in tmp_path.iterdir())
        raise OSError("No space left on device")

    def slowly(self, data, **kwargs):
        time.sleep(0.2)  # Orbax writes small files in a thread of their own
        return write_text(self, data, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "finalize", fail)
        patch.setattr(path_type, "write_text", slowly)
        yield names


def test_half_written_checkpoint_has_no_name(tmp_path):
    message = r"cannot write .*a: .*No space left on device"
    with full_disk(tmp_path) as names, pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "a", wrapped())
    # Written it was: under another name.
    assert names
    assert "a" not in names
    assert not list(tmp_path.iterdir())


def test_half_written_step_is_no_step(tmp_path):
    adapted = wrapped()
    with checkpoint.Manager(tmp_path, max_to_keep=1) as manager:
        manager.save(1, adapted)
    with full_disk(tmp_path) as names, checkpoint.Manager(tmp_path, max_to_keep=1) as manager:
        for _ in range(2):
            manager.save(2, adapted)
            assert 2 in manager.all_steps()
            with pytest.raises(CheckpointError, match=r"writing has failed in .*No space left"):
                manager.wait_until_finished()
            assert any(name.startswith("2.") for name in names)
            # Nothing is left of it, and the step that was to go is there.
            assert [p.name for p in tmp_path.iterdir()] == ["1"]
            assert manager.all_steps() == [1]
    with checkpoint.Manager(tmp_path) as manager:
        assert manager.all_steps() == [1]
        assert manager.restore(base_params()).step == 1
        assert manager.save(2, adapted)
        manager.wait_until_finished()
        assert manager.restore(base_params()).step == 2


# Damaged files


def test_newer_format(copy):
    edit_record(copy, lambda record: record.update(format=99))
    with pytest.raises(CheckpointError, match=r"is of format 99, .* reads up to 1; upgrade"):
        restore(copy)


def test_damaged_record(copy):
    edit_record(copy, lambda record: record.update(step=8), fix_checksum=False)
    with pytest.raises(CheckpointError, match=r"metadata is damaged: its checksum is .* expected"):
        restore(copy)
    file = copy / "tied_lora" / "metadata"
    file.write_text(file.read_text()[:-100])
    with pytest.raises(CheckpointError, match=r"damaged record in .*metadata: JSONDecodeError"):
        restore(copy)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"damaged record in .*KeyError: 'record'"):
        restore(copy)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no .*metadata; found .*adapted, .*opt_state"):
        restore(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["config"].update(r=0), "LoraConfig: r=0"),
        (lambda plan: plan["config"].update(colour="red"), "colour"),
        (lambda plan: plan.pop("groups"), "KeyError.*groups"),
        (lambda plan: plan["groups"][0].pop("shape"), "KeyError.*shape"),
        (lambda plan: plan.update(format=99), "format 99; expected 1"),
    ],
)
def test_damaged_plan(copy, change, message):
    edit_record(copy, lambda record: change(record["plan"]))
    with pytest.raises(CheckpointError, match=f"the plan cannot be read in .*{message}") as caught:
        restore(copy)
    assert caught.value.__cause__ is not None


def test_plan_of_other_factors(copy):
    edit_record(copy, lambda record: record["plan"]["groups"][0]["adapters"][0].update(rank=3))
    message = r"adapted in .* does not fit: .*lora_a' is float32\[\d+, 2\] in .* float32\[\d+, 3\]"
    with pytest.raises(CheckpointError, match=message):
        restore(copy)


@pytest.mark.parametrize("item", ["adapted", "opt_state", "extra"])
def test_missing_item(copy, item):
    shutil.rmtree(copy / item)
    with pytest.raises(CheckpointError, match=f"adapter/{item} is missing, though the record"):
        restore(copy, opt_state=OPTIMIZER)


def files_of_arrays(path):
    return sorted(f for f in (path / "adapted").rglob("*") if f.is_file() and f.stat().st_size)


@reads_damaged_files
def test_missing_files(copy):
    (copy / "adapted" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"missing or damaged files in .*adapted") as caught:
        restore(copy)
    assert caught.value.__cause__ is not None
    (copy / "adapted" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match=r"missing or damaged files in .*; restore another"):
        restore(copy)


@reads_damaged_files
def test_truncated_files(copy):
    outcomes = set()
    for file in files_of_arrays(copy):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        outcomes.add(outcome(copy))
        file.write_bytes(content)
    # Some files say nothing that is needed.
    assert outcomes == {"same", "error"}


@reads_damaged_files
def test_flipped_bits(copy):
    outcomes = []
    for file in files_of_arrays(copy):
        content = bytearray(file.read_bytes())
        for place in np.linspace(0, len(content) - 1, 4).astype(int):
            content[place] ^= 8
            file.write_bytes(content)
            outcomes.append(outcome(copy))
            content[place] ^= 8
        file.write_bytes(content)
    assert set(outcomes) == {"same", "error"}
    assert outcomes.count("error") > 10


def outcome(path):
    try:
        found = restore(path).adapted.adapters
    except CheckpointError:
        return "error"
    same = jax.tree.map(np.array_equal, found, wrapped().adapters)
    return "same" if all(jax.tree.leaves(same)) else "silently other values"


def test_data_that_orbax_does_not_check(copy):
    data = (copy / "adapted" / "ocdbt.process_0" / "d").iterdir()
    largest = max(data, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapted leaf 'adapters\.lora\..* is damaged: its"):
        restore(copy)
