"""quantize: what is stored in which blocks, plain params from it, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import flax_tied_lora as tied_lora
from flax_tied_lora import QuantizedArray
from tests.helpers.oracle import array
from tests.helpers.quantized_model import MATRICES, PARAMS, SITES, WIDTH, each_qtype, flat, wrapped


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
