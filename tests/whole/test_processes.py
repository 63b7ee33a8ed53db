"""Several processes with one mesh: checkpoints, files, ties and sums of arrays that none has whole.

Two processes of two devices run `in_processes.py`; what they found and wrote is judged here, on the
eight devices of one process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint, peft
from flax_tied_lora._adapters.fingerprint import fingerprint
from tests.helpers import in_processes as program
from tests.helpers import processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, Any]]:
    """What each process found, by the name of the check."""
    printed = processes.run(
        Path(program.__file__), ["--folder", str(folder)], processes=2, devices=2
    )
    lines = [[x for x in text.splitlines() if x.startswith("{")] for text in printed]
    return [{k: v for line in own for k, v in json.loads(line).items()} for own in lines]


@pytest.fixture(scope="module")
def expected() -> tied_lora.Adapted:
    """What the processes had, made here on one device."""
    return program.trained(tied_lora.wrap(program.params_on(None), program.CONFIG))


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_they_share_a_mesh(found):
    assert [own["devices"] for own in found] == [[2, 4], [2, 4]]
    alike = set(found[0]) - {"peft"}
    assert {k: v for k, v in found[0].items() if k in alike} == {
        k: v for k, v in found[1].items() if k in alike
    }


@pytest.mark.parametrize("name", ["oracle", *program.OTHERS])
def test_adapted_is_merged(found, name):
    assert found[0][name] < 2e-5


def test_the_fingerprint_is_that_of_one_process(found, expected):
    one = json.loads(json.dumps(fingerprint(expected.params, expected.plan)))
    assert found[0]["fingerprint"] == one


def test_a_checkpoint_is_restored_by_them_and_on_another_mesh(found, folder, expected):
    assert found[0]["restored"] == [0.0, 5]
    mesh = jax.make_mesh((2, 4), ("y", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = program.params_on(mesh)
    restored = checkpoint.restore(folder / "adapter", params)
    assert_close(restored.adapted.adapters, expected.adapters)
    factor = restored.adapted.adapters["lora"][program.TABLE]["lora_a"]
    assert factor.sharding == jax.NamedSharding(mesh, jax.P("x", None))
    assert jax.random.key_data(restored.extra["key"]).tolist() == [0, 3]
    assert restored.extra["n"].tolist() == [0, 1, 2]


def test_whole_params(found, folder, expected):
    assert found[0]["whole"] == 0
    assert_close(checkpoint.restore_params(folder / "merged"), tied_lora.merge(expected))


def test_one_process_writes_the_files_of_peft(found, folder, expected):
    assert [own["peft"][0] for own in found] == [0, 0]
    params = program.params_on(None)
    assert_close(peft.load_adapter(folder / "peft", params, program.NAMES).adapters,
                 expected.adapters)  # fmt: skip
    first, second = (own["peft"][1] for own in found)
    assert "expected none of these to be there; pass overwrite=True" in first
    assert second.startswith("AdapterFileError: ")
    assert "process 0, which writes for all, has failed" in second


def test_equal_values_are_found(found):
    assert found[0]["equal values"] == [["lm_head/kernel", program.TABLE]]


@pytest.mark.parametrize(
    ("name", "most"), [("sums", 1e-5), ("extracted", 1e-5), ("quantized", 0.5)]
)
def test_other_operations(found, name, most):
    assert found[0][name] < most


@pytest.mark.parametrize("name", ["stacked", "grown"])
def test_stacks_and_grown_tables(found, name):
    assert max(found[0][name]) < 2e-5


def test_gradients_are_where_their_factors_are(found, expected):
    run = tied_lora.adapt(program.model, on_dense="error")
    _, grads = jax.jit(
        tied_lora.value_and_grad(lambda a: jax.numpy.sum(jax.numpy.sin(run(a, program.TOKENS))))
    )(expected)
    np.testing.assert_allclose(found[0]["gradients"], optax.tree.norm(grads), rtol=1e-5)


def test_training_through_nnx(found):
    losses = program.in_nnx(program.params_on(None))
    np.testing.assert_allclose(found[0]["nnx"], losses, rtol=1e-5)
    assert losses[-1] < losses[0]


def test_an_adapted_is_printed(found, expected):
    assert found[0]["printed"] == str(expected)


def test_what_differs_between_processes_is_not_saved(found):
    message = found[0]["differs"]
    assert message.startswith("CheckpointError: save: extra leaf 'mine' has not the same values in")
    assert found[0]["never"] is False


@pytest.mark.parametrize(("name", "what"), [("save_merged", ""), ("state dict", "to_state_dict")])
def test_what_takes_whole_leaves_refuses_parts(found, name, what):
    message = found[0][name]
    assert message.startswith(f"ValueError: {what or name}: leaf 'transformer/")
    assert "is spread over the devices of 2 processes" in message
    assert "checkpoint.save_params" in message


@pytest.mark.slow
def test_a_process_that_dies_leaves_no_checkpoint(tmp_path):
    """Process 1 ends just before it would write its parts; the other is ended, and ends."""
    processes.run(
        Path(program.__file__), ["--folder", str(tmp_path), "--dies"],
        processes=2, devices=2, check=False,
    )  # fmt: skip
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        checkpoint.restore(tmp_path / "adapter", program.params_on(None))
