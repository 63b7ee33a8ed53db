"""Checksums and fingerprints: the same wherever an array lives, another for any other array."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._adapters.fingerprint import (
    SAMPLE,
    _on_device,
    _sampled,
    checksum,
    differences,
    fingerprint,
)

DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "int8",
    "uint16",
    "int32",
    "bool",
    "int4",
    "float8_e4m3fn",
    "float4_e2m1fn",
]


def some(dtype, shape=(12, 8)):
    bits = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 7, shape)
    return bits.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (12, 8), (3, 0), (2, 3, 4)])
def test_the_same_for_numpy_and_jax(dtype, shape):
    host = some(dtype, shape)
    assert int(checksum(host)) == int(checksum(jnp.asarray(host)))


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex64"])
def test_wide_arrays(dtype):
    host = some(dtype)
    other = host.copy()
    other.view(np.uint8).reshape(-1)[7] ^= 1
    assert checksum(host) != checksum(other)
    if dtype == "complex64":
        assert checksum(host) == checksum(jnp.asarray(host))
    with jax.enable_x64(True):
        assert int(checksum(host)) == int(checksum(jnp.asarray(host)))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("spec", [jax.P("x"), jax.P(None, "y"), jax.P("y", "x"), jax.P(("x", "y"))])
@pytest.mark.parametrize("made", [_on_device, _sampled])
def test_no_table_is_gathered_for_it(made, spec, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    table = jax.device_put(jnp.zeros((1024, 256)), jax.NamedSharding(mesh, spec))
    compiled = made.lower(table).compile()
    sizes = re.findall(
        r"= [a-z]+\d+\[([\d,]*)\]\S* (?:all-|collective|reduce-scatter)", compiled.as_text()
    )
    assert sizes
    assert max(math.prod(int(n) for n in size.split(",") if n) for size in sizes) <= SAMPLE
    own = table.addressable_shards[0].data.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * own


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_the_same_on_every_sharding(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    host = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    params = {"layer": {"kernel": host}}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=1, target_modules=["kernel"]))
    expected = fingerprint(params, adapted.plan)
    for spec in (jax.P(), jax.P("x"), jax.P("y", "x"), jax.P(None, ("x", "y"))):
        array = jax.device_put(host, jax.NamedSharding(mesh, spec))
        assert int(checksum(array)) == int(checksum(host))
        assert fingerprint({"layer": {"kernel": array}}, adapted.plan) == expected
    on_another = jax.device_put(host, jax.devices()[3])
    assert fingerprint({"layer": {"kernel": on_another}}, adapted.plan) == expected


def test_any_one_entry_shows():
    host = np.random.default_rng(0).normal(size=(13, 7)).astype(np.float32)
    seen = {int(checksum(host))}
    for place in np.ndindex(host.shape):
        for bit in (0, 15, 31):
            other = host.copy()
            other.view(np.uint32)[place] ^= np.uint32(1 << bit)
            seen.add(int(checksum(other)))
    assert len(seen) == 1 + 3 * host.size


def test_order_and_sign_show():
    host = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    others = (host, -host, host.T, host[::-1], np.roll(host, 1), np.sort(host))
    assert len({int(checksum(x)) for x in others}) == len(others)


def plan_and_params(ties=()):
    keys = iter(jax.random.split(jax.random.key(0), 2))
    table = jax.random.normal(next(keys), (200, 50), jnp.bfloat16)
    kernel = jax.random.normal(next(keys), (50, 50), jnp.bfloat16)
    params = {"embed": {"embedding": table}, "mid": {"kernel": kernel}, "head": {"kernel": table.T}}
    config = tied_lora.LoraConfig(r=1, target_modules=["embed"])
    return tied_lora.wrap(params, config, ties=list(ties)).plan, params


def test_reads_every_leaf_and_each_tie_once():
    plan, params = plan_and_params([("embed/embedding", "head/kernel")])
    found = fingerprint(params, plan)
    assert set(found) == {"embed/embedding", "mid/kernel"}
    assert found["mid/kernel"][:2] == [[50, 50], "bfloat16"]


def test_another_fine_tune_of_a_leaf_without_adapters_shows():
    plan, params = plan_and_params()
    # So small a step that in bfloat16 most entries stay as they are.
    step = 2e-4 * jax.random.normal(jax.random.key(3), (50, 50))
    kernel = (params["mid"]["kernel"].astype(jnp.float32) + step).astype(jnp.bfloat16)
    same = float((kernel == params["mid"]["kernel"]).mean())
    assert 0.7 < same < 1
    other = {**params, "mid": {"kernel": kernel}}
    lines = differences(fingerprint(params, plan), fingerprint(other, plan))
    assert lines == ["'mid/kernel' has other values"]


def test_the_sample_is_spread_over_rows_and_columns():
    plan, params = plan_and_params()
    expected = fingerprint(params, plan)["embed/embedding"]
    table = np.asarray(params["embed"]["embedding"])

    def shows(rows, columns):
        other = table.copy()
        other[rows, columns] += 1
        changed = {**params, "embed": {"embedding": other}}
        return fingerprint(changed, plan)["embed/embedding"] != expected

    assert table.size > 10 * SAMPLE
    assert all(shows(slice(start, start + 10), slice(None)) for start in range(0, 200, 10))
    assert all(shows(slice(None), slice(start, start + 2)) for start in range(0, 50, 2))


def test_abstract_leaves_have_shapes_only():
    plan, params = plan_and_params()
    saved, abstract = fingerprint(params, plan), fingerprint(jax.eval_shape(lambda: params), plan)
    assert all(total is None for _, _, total in abstract.values())
    assert differences(saved, abstract) == differences(abstract, saved) == []
