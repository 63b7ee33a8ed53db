"""Full params that cannot be saved, or be read into what is given: each says what differs."""

from __future__ import annotations

import json
import re
import zlib

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.saved_base import TIES, base_params, changed, without, wrapped


def test_params_that_are_adapted(tmp_path):
    with pytest.raises(CheckpointError, match=r"save tied_lora.merge\(adapted\)"):
        checkpoint.save_params(tmp_path / "a", wrapped())
    assert not list(tmp_path.iterdir())


def test_params_into_a_target_that_does_not_fit(tmp_path):
    checkpoint.save_params(tmp_path / "p", base_params(), ties=TIES)
    for target, message in (
        (without("head"), "the target has no 'head/kernel', which .* as a member of the tie group"),
        (without("dense"), "params in .*'dense.bias' is only in the checkpoint"),
        (changed("dense/bias", jnp.ones(3)), r"'dense.bias' is float32\[16\] in the checkpoint"),
        (
            changed("head/kernel", jnp.ones((64, 16))),
            r"'head/kernel' is \(16, 64\) in .* \(64",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.restore_params(tmp_path / "p", target)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(CheckpointError, match="sharding is not like the params of"):
        checkpoint.restore_params(tmp_path / "p", sharding={"dense": place})
    with pytest.raises(CheckpointError, match=re.escape("restore: ")):
        checkpoint.restore_params(tmp_path / "nowhere")


# What the record says of ties and of quantised leaves


def quantized(qtype="int8"):
    params = {
        "embed": base_params()["embed"],
        "dense": {"kernel": base_params()["dense"]["kernel"]},
    }
    return tied_lora.quantize(params, qtype, block_size=16, exclude_modules=["embed"])


def test_a_target_that_is_quantised_in_another_way(tmp_path):
    checkpoint.save_params(tmp_path / "p", quantized("nf4"))
    message = "is quantised as int4 along axis 0 in the target, and as nf4 along axis 0 in"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore_params(tmp_path / "p", quantized("int4"))
    checkpoint.save_params(tmp_path / "q", {"dense": {"kernel": jnp.ones((8, 8))}})
    with pytest.raises(CheckpointError, match=r"is quantised as .* in the target, and not in"):
        checkpoint.restore_params(tmp_path / "q", quantized())


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"dense/kernel": ["int3", 0]}, "as 'int3'; expected one of "),
        ({"dense/kernel": ["int4", 0]}, r"is int8\[16, 16\] .*; expected uint8 in blocks along"),
        ({"dense/kernel": ["int8", 1]}, r"is int8\[16, 16\] .*; expected int8 in blocks along ax"),
        ({"dense/kernel": ["int8", 2]}, r"is int8\[16, 16\] .*; expected int8 in blocks along ax"),
        ({"dense/kernel": ["int8"]}, "expected a type of quantised values and an axis"),
        ({"dense/../kernel": ["int8", 0]}, "is quantised; expected a leaf that is there"),
        ({"embed/embedding": ["int8", 0]}, "is quantised; expected values and scales"),
    ],
)
def test_a_record_of_other_quantised_leaves(tmp_path, stored, message):
    checkpoint.save_params(tmp_path / "p", quantized())
    edit_record(tmp_path / "p", quantized=stored)
    with pytest.raises(CheckpointError, match=f"damaged record in .*: ValueError: .*{message}"):
        checkpoint.restore_params(tmp_path / "p")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["../x", "head/kernel"], "'../x' is nothing, and .* holds it as the array of 'head/kern"),
        (
            ["dense/bias", "head/kernel"],
            r"'dense/bias' is of shape \(16,\), and .* holds it as the",
        ),
        (["embed/embedding", "nowhere"], "the target has no 'nowhere'"),
    ],
)
def test_a_record_of_other_ties(tmp_path, members, message):
    checkpoint.save_params(tmp_path / "p", base_params(), ties=TIES)
    tie = [{"path": path, "transposed": i > 0} for i, path in enumerate(members)]
    edit_record(tmp_path / "p", ties=[{"members": tie, "found": ["declared"]}])
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore_params(tmp_path / "p")


def edit_record(path, **fields):
    file = path / "tied_lora" / "metadata"
    record = {**json.loads(file.read_text())["record"], **fields}
    crc32 = zlib.crc32(json.dumps(record, sort_keys=True).encode())
    file.write_text(json.dumps({"record": record, "crc32": crc32}))
