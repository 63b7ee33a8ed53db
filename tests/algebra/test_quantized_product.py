"""Products with a quantised weight: what they hold at a time, and what they give on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import flax_tied_lora as tied_lora
from flax_tied_lora import QuantizedArray
from flax_tied_lora._algebra import quantized_product as _quantized_product
from tests.helpers.compiling import as_shipped
from tests.helpers.oracle import array, labelled, numbers, perturbed
from tests.helpers.quantized_model import each_qtype


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that small matrices are served a chunk at a time, too, with a rest."""
    monkeypatch.setattr(_quantized_product, "CHUNK", 600)
    monkeypatch.setattr(_quantized_product, "CHUNKS", 7)


@each_qtype
def test_the_table_is_never_dequantised_whole(qtype):
    """Neither in the program nor by the compiler, which is told by the memory that it takes."""
    table = {"embed": {"embedding": array(4096, 64)}}
    whole = 4096 * 64 * 4

    def loss(params, ids, x):
        weight = params["embed"]["embedding"]
        hidden = weight[ids] + x
        return jnp.sum(jnp.sin(hidden @ weight.T))

    config = tied_lora.LoraConfig(r=2, target_modules=["embed"])
    adapted = perturbed(tied_lora.wrap(tied_lora.quantize(table, qtype), config))
    step = jax.jit(tied_lora.value_and_grad(tied_lora.adapt(loss, on_dense="error")))
    lowered = step.lower(adapted, numbers(2, below=4096), array(2, 64))
    assert "f32[4096,64]" not in str(jax.make_jaxpr(step)(adapted, numbers(2, below=4096),
                                                          array(2, 64)))  # fmt: skip
    assert as_shipped(lowered).memory_analysis().temp_size_in_bytes < whole / 4


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_step_holds_one_dequantised_layer_at_a_time(qtype, monkeypatch):
    """XLA would dequantise each matrix once, ahead of time, for both passes: all at once."""
    monkeypatch.undo()
    layers, width = 8, 128
    params = {f"layer_{i}": {"kernel": array(width, width, seed=i)} for i in range(layers)}

    def loss(params, x):
        for i in range(layers):
            x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"])
        return x.sum()

    config = tied_lora.LoraConfig(r=2, target_modules=[r"layer_\d"][0])
    adapted = tied_lora.wrap(params, config)

    def memory(adapted):
        step = jax.jit(tied_lora.value_and_grad(tied_lora.adapt(loss, on_dense="error")))
        compiled = as_shipped(step.lower(adapted, array(4, width)))
        return compiled.memory_analysis().temp_size_in_bytes

    layer = width * width * 4
    # Of four bits the integers are unpacked on the way: a byte for each of them, and numbers.
    assert memory(tied_lora.quantize(adapted, qtype)) < memory(adapted) + 2.5 * layer


@pytest.mark.parametrize("spec", [P("data", None), P(None, "data")])
def test_sharded_base(spec):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    adapted = labelled((32, 24), (0,), (1,))
    leaf = QuantizedArray.of(adapted.params["dense"]["kernel"], "nf4", 0, 8)
    sharded = jax.device_put(leaf, jax.NamedSharding(mesh, spec))
    x = array(3, 32)

    def fn(params, x):
        return x @ params["dense"]["kernel"]

    expected = fn(tied_lora.merge(adapted.replace(params={"dense": {"kernel": leaf}})), x)
    adapted = adapted.replace(params={"dense": {"kernel": sharded}})
    run = jax.jit(tied_lora.adapt(fn, on_dense="error"))
    np.testing.assert_allclose(run(adapted, x), expected, rtol=1e-5, atol=1e-5)

    def local(params, x):
        total = x @ params["dense"]["kernel"]
        return jax.lax.psum(total, "data") if spec[0] else total

    specs = ({"dense": {"kernel": spec}}, P(None, spec[0]))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None, spec[1]))
    found = jax.jit(tied_lora.adapt(mapped, on_dense="error"))(adapted, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [P("data", None), P(None, "data")])
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_explicit_mesh_axes(qtype, spec):
    """As `jax.make_mesh` makes them: quantised, looked up, multiplied and differentiated there."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    table = 0.1 * array(64, 32)
    config = tied_lora.LoraConfig(r=2, target_modules=["embed"], use_dora=qtype == "nf4")

    def loss(params, ids):
        weight = params["embed"]["embedding"]
        hidden = jnp.tanh(weight.at[ids].get(out_sharding=P()))
        return jnp.sum(jnp.sin(jnp.einsum("bd,vd->bv", hidden, weight, out_sharding=P())))

    ids = numbers(3, below=64)
    run = jax.jit(tied_lora.value_and_grad(tied_lora.adapt(loss, on_dense="error")))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(table, jax.NamedSharding(mesh, spec))
        stored = tied_lora.quantize({"embed": {"embedding": sharded}}, qtype, block_size=16)
        leaf = stored["embed"]["embedding"]
        assert leaf.values.sharding.spec == leaf.scales.sharding.spec == spec
        assert leaf.dequantize().sharding.spec == spec
        adapted = tied_lora.wrap(stored, config)
        adapters = jax.tree.map(
            lambda x, y: jax.device_put(x, y.sharding),
            perturbed(adapted).adapters, adapted.adapters,
        )  # fmt: skip
        adapted = adapted.replace(adapters=adapters)
        found, wanted = run(adapted, ids), run(tied_lora.dequantize(adapted), ids)
        # A scale for each row, and too few of them to be cut: replicated.
        odd = jax.device_put(table, jax.NamedSharding(mesh, P(None, "data")))
        assert QuantizedArray.of(odd, qtype, 1, 32).scales.sharding.spec == P(None, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_factors_are_placed_like_the_stored_leaf():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    leaf = jax.device_put(
        QuantizedArray.of(array(32, 24), "int8", 0, 8), jax.NamedSharding(mesh, P("data", None))
    )
    adapted = tied_lora.wrap(
        {"dense": {"kernel": leaf}}, tied_lora.LoraConfig(r=2, target_modules=["dense"])
    )
    factors = adapted.adapters["lora"]["dense/kernel"]
    assert factors["lora_a"].sharding.spec == P("data", None)
    assert factors["lora_b"].sharding.spec == P(None, None)
