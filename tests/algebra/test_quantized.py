"""Reads of a weight that is stored quantised: the oracle is the model with dequantised params."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import QuantizedArray
from flax_tied_lora._algebra import quantized_product as _quantized_product
from tests.helpers import oracle
from tests.helpers.oracle import array, check, labelled, numbers, perturbed
from tests.helpers.quantized_model import (
    MATRICES,
    PARAMS,
    QTYPES,
    SITES,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Model,
    apply,
    each_qtype,
    wrapped,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that small matrices are served a chunk at a time, too, with a rest."""
    monkeypatch.setattr(_quantized_product, "CHUNK", 600)
    monkeypatch.setattr(_quantized_product, "CHUNKS", 7)


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


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_parts_of_no_entries(seed, axis):
    """As a roll by no step makes; of each qtype, cut along the blocks and across them."""
    adapted = oracle.wrapped(
        {"dense": {"kernel": array(8, 6, seed=1)}}, ["dense"], kind="quantized", seed=seed
    )

    def fn(params, x):
        w = params["dense"]["kernel"]
        none = w[:0] if axis == 0 else w[:, :0]
        return none, x @ jnp.roll(w, 0, axis), jnp.concatenate([none, w], axis)

    check(fn, adapted, array(3, 8, seed=2), on_dense="allow")


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
