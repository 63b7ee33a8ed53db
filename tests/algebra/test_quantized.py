"""Bases that are stored quantised: the oracle is the model with the dequantised params."""

from __future__ import annotations

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

import flax_tied_lora as tied_lora
from flax_tied_lora import QuantizedArray, checkpoint
from flax_tied_lora._algebra import quantized_product as _quantized_product
from flax_tied_lora._tree.paths import flatten
from tests.helpers.compiling import as_shipped
from tests.helpers.oracle import array, check, labelled, numbers, perturbed

VOCABULARY, WIDTH = 96, 32
QTYPES = ("int8", "nf4", "int4")
TOKENS = numbers(2, 6, below=VOCABULARY)
each_qtype = pytest.mark.parametrize("qtype", QTYPES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that small matrices are served a chunk at a time, too, with a rest."""
    monkeypatch.setattr(_quantized_product, "CHUNK", 600)
    monkeypatch.setattr(_quantized_product, "CHUNKS", 7)


class Model(nn.Module):
    """A tied table, a kernel with head axes, one that sums over two axes, two plain ones."""

    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype, name="embed_tokens")
        x = table(tokens)
        x += nn.DenseGeneral(WIDTH, axis=(-2, -1), dtype=self.dtype, name="o_proj")(
            nn.DenseGeneral((2, 16), dtype=self.dtype, name="q_proj")(x)
        )
        up = nn.tanh(nn.Dense(64, dtype=self.dtype, name="up")(x))
        return table.attend(x + nn.Dense(WIDTH, dtype=self.dtype, name="down")(up))


MODEL = Model()
PARAMS = MODEL.init(jax.random.key(0), TOKENS)["params"]
SITES = tied_lora.trace(MODEL.apply, {"params": PARAMS}, TOKENS)
MATRICES = {p for p, x in traverse_util.flatten_dict(PARAMS, sep="/").items()
            if x.ndim > 1 and not p.endswith("bias")}  # fmt: skip


def apply(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def wrapped(params, **fields) -> tied_lora.Adapted:
    fields = {"r": 3, "target_modules": ["embed_tokens", "q_proj"], **fields}
    return perturbed(tied_lora.wrap(params, tied_lora.LoraConfig(**fields), sites=SITES), size=0.2)


def flat(tree):
    return flatten(tree)[0]


# What is stored


@each_qtype
def test_matrices_are_quantised_and_the_rest_is_not(qtype):
    stored = flat(tied_lora.quantize(PARAMS, qtype, block_size=32))
    assert {p for p, x in stored.items() if isinstance(x, QuantizedArray)} == MATRICES
    for path in MATRICES:
        own, leaf = stored[path], flat(PARAMS)[path]
        assert (own.shape, own.dtype, own.qtype) == (leaf.shape, leaf.dtype, qtype)
        error = np.abs(own.dequantize() - leaf).max() / np.abs(leaf).max()
        assert error < {"int8": 0.005, "nf4": 0.17, "int4": 0.1}[qtype]
    for path in stored.keys() - MATRICES:
        assert stored[path] is flat(PARAMS)[path]


@each_qtype
@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [((6, 8), 1, 4), ((8, 6), 0, 8), ((2, 8, 3), 1, 2), ((4, 2, 6), 2, 6)],
)
def test_dequantised_as_by_qwix(qtype, shape, axis, block):
    import qwix

    leaf = array(*shape)
    own = QuantizedArray.of(leaf, qtype, axis, block)
    others = [i for i in range(len(shape)) if i != axis]
    theirs = qwix.quantize(leaf, qtype, channelwise_axes=others, tiled_axes={axis: block})
    np.testing.assert_array_equal(own.dequantize(), qwix.dequantize(theirs))


def test_bytes_are_those_of_integers_and_scales():
    leaf = array(256, 64)
    for qtype, bits in {"int8": 8, "nf4": 4, "int4": 4}.items():
        own = tied_lora.quantize({"kernel": leaf}, qtype)
        expected = leaf.size * bits // 8 + leaf.size // 64 * 4
        assert own["kernel"].nbytes == tied_lora.stored_bytes(own) == expected
    assert tied_lora.stored_bytes({"a": leaf, "b": leaf}) == leaf.nbytes


def test_blocks_lie_along_the_width():
    def axis_of(path, *shape):
        tree = traverse_util.unflatten_dict({path: array(*shape)}, sep="/")
        return flat(tied_lora.quantize(tree, block_size=32))[path].axis

    assert axis_of("embed_tokens/embedding", 96, 64) == 1
    assert axis_of("dense/kernel", 64, 96) == 0
    assert axis_of("stacked/kernel", 2, 64, 96) == 1
    assert axis_of("q_proj/kernel", 64, 2, 32) == 2  # two heads make no block
    assert axis_of("lm_head/kernel", 64, 101) == 0


def test_shown_whatever_it_holds():
    leaf = QuantizedArray.of(array(32, 32), "nf4", 1, 16)
    assert repr(leaf) == "QuantizedArray(float32[32, 32] as nf4, blocks of 16)"
    shapes = jax.tree.map(jnp.shape, {"kernel": leaf})["kernel"]
    assert repr(shapes) == "QuantizedArray((32, 16), (32, 2), 'nf4', 1)"


def test_shared_leaf_is_quantised_once():
    table = array(64, 32)
    params = {"embed": {"embedding": table}, "head": {"embedding": table}}
    stored = tied_lora.quantize(params)
    assert stored["embed"]["embedding"] is stored["head"]["embedding"]
    (group,) = tied_lora.find_ties(stored)
    assert group.found == ("same array",)
    plain = tied_lora.dequantize(stored)
    assert plain["embed"]["embedding"] is plain["head"]["embedding"]


def test_call_sites_decide_where_they_are_given():
    params = {"offset": {"kernel": array(32, 32)}, "dense": {"kernel": array(32, 32)}}

    def fn(params, x):
        return x @ params["dense"]["kernel"] + params["offset"]["kernel"]

    sites = tied_lora.trace(fn, params, array(32, 32))
    stored = tied_lora.quantize(params, sites=sites)
    assert isinstance(stored["dense"]["kernel"], QuantizedArray)
    assert stored["offset"]["kernel"] is params["offset"]["kernel"]


def test_excluded_modules_stay_as_they_are():
    stored = tied_lora.quantize(PARAMS, exclude_modules=["o_proj", "up"])
    assert flat(stored)["o_proj/kernel"] is flat(PARAMS)["o_proj/kernel"]
    assert isinstance(flat(stored)["down/kernel"], QuantizedArray)


def test_abstract_params_are_quantised_abstractly():
    shapes = jax.eval_shape(lambda: PARAMS)
    stored = tied_lora.quantize(shapes, "nf4")
    expected = jax.eval_shape(lambda: tied_lora.quantize(PARAMS, "nf4"))
    assert stored["up"]["kernel"].shape == (WIDTH, 64)
    assert jax.tree.leaves(stored) == jax.tree.leaves(expected)
    adapted = tied_lora.wrap(stored, tied_lora.LoraConfig(target_modules=["up"]), sites=SITES)
    assert isinstance(adapted.adapters["lora"]["up/kernel"]["lora_a"], jax.ShapeDtypeStruct)


# The oracle


@each_qtype
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"trainable_token_indices": [3, 5, 90]},
     {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
    ids=["lora", "dora", "rows", "copy"],
)  # fmt: skip
def test_adapters_stand_on_a_quantised_base(qtype, fields):
    adapted = wrapped(tied_lora.quantize(PARAMS, qtype, block_size=16), **fields)
    explanation = check(apply, adapted, TOKENS)
    served = {r.site.leaf: r.served for r in explanation.reads}
    assert served.pop("embed_tokens/embedding") in ("low rank", "copy")
    assert served.pop("q_proj/kernel") == "low rank"
    assert set(served.values()) == {"quantised"}
    assert set(served) == MATRICES - {"embed_tokens/embedding", "q_proj/kernel"}


def test_an_adapted_is_quantised_after_it_was_wrapped():
    adapted = wrapped(PARAMS)
    stored = tied_lora.quantize(adapted, block_size=16)
    assert stored.adapters is adapted.adapters
    assert stored.plan is adapted.plan
    again = wrapped(tied_lora.quantize(PARAMS, block_size=16))
    run = tied_lora.adapt(apply)
    np.testing.assert_array_equal(run(stored, TOKENS), run(again, TOKENS))


def test_first_values_of_pissa_are_taken_out_before_quantising():
    fields = {"r": 4, "target_modules": ["up"], "init_lora_weights": "pissa"}
    config = tied_lora.LoraConfig(**fields)
    adapted = tied_lora.quantize(tied_lora.wrap(PARAMS, config, sites=SITES), block_size=16)
    check(apply, adapted, TOKENS)
    with pytest.raises(ValueError, match=r"out of 'up/kernel', which is stored quantised; wrap"):
        tied_lora.wrap(tied_lora.quantize(PARAMS), config, sites=SITES)


def test_tied_and_transposed_member_is_read_from_the_stored_table():
    params = {"embed": {"embedding": array(24, 32)}, "head": {"kernel": array(32, 24)}}

    def fn(params, ids, x):
        return params["embed"]["embedding"][ids], x @ params["head"]["kernel"]

    config = tied_lora.LoraConfig(r=2, target_modules=["embed"])
    ties = [("embed/embedding", "head/kernel")]
    adapted = perturbed(tied_lora.wrap(tied_lora.quantize(params), config, ties=ties))
    assert check(fn, adapted, numbers(5, below=24), array(3, 32)).reads[0].served == "low rank"
    # Not adapted, and tied all the same.
    other = tied_lora.LoraConfig(r=2, target_modules=["dense"])
    params["dense"] = {"kernel": array(32, 32)}
    adapted = perturbed(tied_lora.wrap(tied_lora.quantize(params), other, ties=ties))

    def with_dense(params, ids, x):
        return fn(params, ids, x @ params["dense"]["kernel"])

    check(with_dense, adapted, numbers(5, below=24), array(3, 32))


@each_qtype
def test_indices_out_of_bounds(qtype):
    adapted = wrapped(tied_lora.quantize(PARAMS, qtype), target_modules=["embed_tokens"])
    ids = jnp.array([0, VOCABULARY - 1, VOCABULARY, VOCABULARY + 7, -1])

    def fn(params, mode, fill):
        table = params["embed_tokens"]["embedding"]
        return jnp.take(table, ids, axis=0, mode=mode, fill_value=fill)

    run = tied_lora.adapt(fn, on_dense="error")
    for mode, fill in [("fill", None), ("fill", 2.0), ("clip", None), ("wrap", None)]:
        expected = fn(tied_lora.merge(adapted), mode, fill)
        np.testing.assert_allclose(run(adapted, mode, fill), expected, rtol=1e-5, atol=1e-6)


READS = {
    "x @ w": lambda w, x, ids: x @ w,
    "w.T @ x.T": lambda w, x, ids: w.T @ x.T,
    "cast": lambda w, x, ids: x @ w.astype(jnp.float32),
    "scaled": lambda w, x, ids: x @ (w * 0.5),
    "sliced": lambda w, x, ids: x @ w[:, 4:20],
    "rows": lambda w, x, ids: w.T[ids],
    "a column": lambda w, x, ids: x @ w[:, 3],
    "three axes": lambda w, x, ids: jnp.einsum("ab,bcd->acd", x, w.reshape(32, 4, 6)),
    "both sides": lambda w, x, ids: jnp.einsum("ab,bc,dc->ad", x, w, jnp.ones((2, 24))),
    "checkpoint": lambda w, x, ids: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
    "jit": lambda w, x, ids: jax.jit(lambda w, x: x @ w)(w, x),
    "cond": lambda w, x, ids: jax.lax.cond(
        ids[0] > 3, lambda w, x: x @ w, lambda w, x: x @ (w * 2.0), w, x
    ),
    "vmap": lambda w, x, ids: jax.vmap(lambda row: row @ w)(x),
    "gradient": lambda w, x, ids: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_reads_of_a_kernel(qtype, name):
    adapted = labelled((32, 24), (0,), (1,))
    leaf = QuantizedArray.of(adapted.params["dense"]["kernel"], qtype, 0, 8)
    adapted = adapted.replace(params={"dense": {"kernel": leaf}})
    ids = numbers(5, below=24)
    check(lambda p, x: READS[name](p["dense"]["kernel"], x, ids), adapted, array(3, 32))


def test_stacked_layers_are_dequantised_step_by_step():
    adapted = labelled((3, 16, 16), (1,), (2,))
    for qtype in QTYPES:
        leaf = QuantizedArray.of(adapted.params["dense"]["kernel"], qtype, 1, 8)

        def fn(params, x):
            return jax.lax.scan(
                lambda x, w: (jnp.tanh(x @ w), None), x, params["dense"]["kernel"]
            )[0]  # fmt: skip

        check(fn, adapted.replace(params={"dense": {"kernel": leaf}}), array(4, 16))


def test_what_takes_blocks_apart_is_dequantised_and_reported():
    adapted = labelled((32, 24), (0,), (1,))
    leaf = QuantizedArray.of(adapted.params["dense"]["kernel"], "int8", 0, 8)
    adapted = adapted.replace(params={"dense": {"kernel": leaf}})
    for fn in (
        lambda p, x: x[:, :20] @ p["dense"]["kernel"][:20],  # half a block
        lambda p, x: x @ p["dense"]["kernel"][::-1],
        lambda p, x: x @ jnp.pad(p["dense"]["kernel"], ((0, 0), (0, 2))),
        lambda p, x: x @ jnp.sin(p["dense"]["kernel"]),
        # Walked along the axis of the blocks, in step with the index.
        lambda p, x: x @ jax.vmap(lambda w, i: w[i])(p["dense"]["kernel"], jnp.arange(32) % 24),
    ):
        with pytest.warns(tied_lora.DensifyWarning, match="'dense/kernel'"):
            tied_lora.adapt(fn)(adapted, array(3, 32))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tied_lora.DensifyWarning)
            check(fn, adapted, array(3, 32), on_dense="warn")


@each_qtype
def test_bfloat16(qtype):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    model = Model(jnp.bfloat16)
    adapted = wrapped(tied_lora.quantize(half, qtype, block_size=16))
    assert {x.dtype for x in jax.tree.leaves(tied_lora.base(adapted))} == {jnp.dtype("bfloat16")}

    def narrow(params, tokens):
        return model.apply({"params": params}, tokens)

    check(narrow, adapted, TOKENS, reference=apply)


def test_many_adapters_share_the_quantised_base():
    stored = tied_lora.quantize(PARAMS, block_size=16)
    each = [wrapped(stored), perturbed(wrapped(stored), seed=7, size=0.2)]
    stacked = tied_lora.stack(each)
    run = jax.vmap(tied_lora.adapt(apply), in_axes=(tied_lora.adapter_axes(stacked), 0))
    tokens = numbers(2, 3, 5, below=VOCABULARY)
    program = jax.make_jaxpr(jax.grad(lambda s, t: run(s, t).sum(), allow_int=True))
    assert f"[2,{VOCABULARY},{WIDTH}]" not in str(program(stacked, tokens))
    for one, rows, found in zip(each, tokens, run(stacked, tokens), strict=True):
        expected = apply(tied_lora.merge(one), rows)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Where and what it costs


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


# Plain params from it


def test_base_and_merge_are_plain():
    stored = tied_lora.quantize(PARAMS, block_size=16)
    adapted = wrapped(stored)
    jax.tree.map(
        np.testing.assert_array_equal, tied_lora.base(adapted), tied_lora.dequantize(stored)
    )
    merged = tied_lora.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    plain = tied_lora.dequantize(adapted)
    again = tied_lora.merge(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, again)


def test_checkpoint_of_adapters_knows_its_quantised_base(tmp_path):
    stored = tied_lora.quantize(PARAMS, block_size=16)
    adapted = wrapped(stored)
    checkpoint.save(tmp_path / "adapters", adapted)
    restored = checkpoint.restore(tmp_path / "adapters", stored).adapted
    jax.tree.map(np.testing.assert_array_equal, restored.adapters, adapted.adapters)
    other = tied_lora.quantize(jax.tree.map(lambda x: x + 0.1, PARAMS), block_size=16)
    with pytest.raises(ValueError, match="other values"):
        checkpoint.restore(tmp_path / "adapters", other)


# Bad input


def test_bad_input():
    with pytest.raises(ValueError, match="qtype='int3'; expected one of int8, int4, nf4"):
        tied_lora.quantize(PARAMS, "int3")
    with pytest.raises(ValueError, match="block_size=8; expected an int of at least 16"):
        tied_lora.quantize(PARAMS, block_size=8)
    with pytest.raises(ValueError, match=r"'\S+kernel' is quantised already; quantize\(dequantize"):
        tied_lora.quantize(tied_lora.quantize(PARAMS))
    with pytest.raises(ValueError, match=r"names no leaf; there are, among others, .*embed_tokens"):
        tied_lora.quantize(PARAMS, exclude_modules=["embed_token"])
    with pytest.raises(ValueError, match="no leaf to quantise"):
        tied_lora.quantize({"dense": {"kernel": array(7, 9), "bias": array(32)}})


def test_quantising_needs_qwix(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(ImportError, match=r"pip install 'flax-tied-lora\[quantized\]'"):
        tied_lora.quantize({"dense": {"kernel": array(48, 80)}})
