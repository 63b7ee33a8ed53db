"""Leaves of every shape: axes by the trace, served low rank, equal to the merged model's."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array, check, numbers, perturbed, wrapped
from tests.helpers.small_models import init

X = array(2, 3, 8, seed=5)
HEADS = array(2, 3, 2, 4, seed=6)
IMAGE = array(1, 4, 4, 3, seed=3)
IDS = numbers(2, 3, below=16)
PICKED = numbers(2, 3, 2, below=4)
ONE_HOT = jax.nn.one_hot(PICKED, 4)


def _conv(x, w, strides=(1, 1), **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=numbers, **options)


def _gated(gate, up):
    return jax.nn.gelu(gate) * up


def _scan(step, w, x):
    return lax.scan(lambda c, kernel: (jnp.tanh(step(c, kernel)), None), x, w)[0]


def _ragged_general(w):
    dims = lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
    return lax.ragged_dot_general(X.reshape(6, 8), w, jnp.array([1, 2, 0, 3]), dims)


# Name -> shape, function of the leaf, rows, columns and batch axes.
KERNELS = {
    "q [d, heads, k]": ((8, 2, 4), lambda w: jnp.einsum("btd,dhk->bthk", X, w), (0,), (1, 2)),
    "q [heads, d, k]": ((2, 8, 4), lambda w: jnp.einsum("btd,hdk->bhtk", X, w), (1,), (0, 2)),
    "o [heads, k, d]": ((2, 4, 8), lambda w: jnp.einsum("bthk,hkd->btd", HEADS, w), (0, 1), (2,)),
    "Gemma's qkv": (
        (3, 2, 8, 4), lambda w: jnp.einsum("btd,sndh->sbtnh", X, w), (2,), (0, 1, 3)
    ),
    "qkv [d, 3, heads, k], split": (
        (8, 3, 2, 4),
        lambda w: [jnp.einsum("btd,dhk->bthk", X, y[:, 0]) for y in jnp.split(w, 3, axis=1)],
        (0,), (2, 3), (1,),
    ),
    "qkv, the result split": ((8, 12), lambda w: jnp.split(X @ w, 3, axis=-1), (0,), (1,)),
    "qkv, the kernel cut": ((8, 12), lambda w: [X @ w[:, :4], X @ w[:, 4:]], (0,), (1,)),
    "gate and up by index": ((2, 8, 6), lambda w: _gated(X @ w[0], X @ w[1]), (1,), (2,), (0,)),
    "gate and up at once": (
        (2, 8, 6), lambda w: _gated(*jnp.einsum("btd,cdf->cbtf", X, w)), (1,), (0, 2)
    ),
    "at once and by index": (
        (2, 8, 6), lambda w: (jnp.einsum("btd,cdf->cbtf", X, w), X @ w[1]), (1,), (0, 2)
    ),
    "MLA, both ways": (
        (8, 2, 4),
        lambda w: (jnp.einsum("btc,chk->bthk", X, w), jnp.einsum("bthk,chk->bthc", HEADS, w)),
        (0,), (1, 2),
    ),
    "layers": ((3, 8, 8), lambda w: _scan(jnp.matmul, w, X), (1,), (2,), (0,)),
    "experts picked for each token": (
        (4, 8, 6), lambda w: jnp.einsum("btd,btkdf->btkf", X, w[PICKED]), (1,), (2,), (0,)
    ),
    "experts picked and summed": (
        (4, 8, 6),
        lambda w: jnp.einsum("btkd,btkdf->btf", X[:, :, None] * ONE_HOT[..., :1], w[PICKED]),
        (1,), (2,), (0,),
    ),
    "tokens dispatched to experts": (
        (4, 8, 6),
        lambda w: jnp.einsum("ecd,edf->ecf", jnp.einsum("btd,btke->etkd", X, ONE_HOT)[:, 0], w),
        (1,), (2,), (0,),
    ),
    "experts all at once": ((4, 8, 6), lambda w: jnp.einsum("btd,edf->btef", X, w), (1,), (0, 2)),
    "ragged, contracted over the last axis": ((4, 6, 8), _ragged_general, (2,), (1,), (0,)),
    "patches by convolution": (
        (2, 2, 3, 6), lambda w: _conv(IMAGE, w, (2, 2)), (0, 1, 2), (3,)
    ),
    "patches by a product": (
        (2, 2, 3, 6),
        lambda w: jnp.einsum("bhpwqc,pqcf->bhwf", IMAGE.reshape(1, 2, 2, 2, 2, 3), w),
        (0, 1, 2), (3,),
    ),
    "depthwise": (
        (3, 3, 1, 6), lambda w: _conv(IMAGE, w, feature_group_count=3), (0, 1, 2), (3,)
    ),
    "stacked convolutions": (
        (2, 3, 3, 3, 3), lambda w: _scan(_conv, w, IMAGE), (1, 2, 3), (4,), (0,)
    ),
    "convolutions under vmap": (
        (2, 3, 3, 3, 6), lambda w: jax.vmap(_conv, (None, 0))(IMAGE, w), (1, 2, 3), (0, 4)
    ),
}  # fmt: skip

TABLES = {
    "padded, logits cut": ((16, 8), lambda w: (w[IDS] @ w.T)[..., :13], (0,), (1,)),
    "padded, table cut": ((16, 8), lambda w: w[IDS] @ w[:13].T, (0,), (1,)),
    "adaptive softmax": (
        (16, 8), lambda w: [w[IDS] @ w[:4].T, w[IDS] @ w[4:10].T, w[IDS] @ w[10:].T], (0,), (1,)
    ),
    "adaptive input": (
        (16, 8), lambda w: jnp.where((IDS < 4)[..., None], w[:4][IDS % 4], w[4:][IDS % 12]), (0,),
        (1,),
    ),
    "positions": ((16, 8), lambda w: X + w[None, :3], (0,), (1,)),
    "positions, all": ((3, 8), lambda w: jnp.expand_dims(w, 0) + X, (0,), (1,)),
    "positions, subtracted and scaled": ((16, 8), lambda w: 2.0 * w[None, :3] - X, (0,), (1,)),
    "positions [1, n, d]": ((1, 16, 8), lambda w: X + w[:, :3], (1,), (2,), (0,)),
    "positions, a batch of one": ((1, 16, 8), lambda w: X[:1] + w[:, :3], (1,), (2,), (0,)),
    "positions of a step": (
        (16, 8), lambda w: X[:, 0] + lax.dynamic_index_in_dim(w, IDS[0, 0], 0), (0,), (1,)
    ),
    "positions by number": ((16, 8), lambda w: X + w[jnp.arange(3)][None], (0,), (1,)),
    "vocabulary second": ((8, 16), lambda w: jnp.take(w, IDS, axis=1).transpose(1, 2, 0) @ w,
                          (1,), (0,)),
    "relative positions": ((16, 2), lambda w: w[IDS].transpose(2, 0, 1), (0,), (1,)),
    "relative positions [heads, buckets]": (
        (2, 16), lambda w: jnp.einsum("hb,qkb->hqk", w, jax.nn.one_hot(IDS, 16)), (1,), (0,)
    ),
    "one-hot by the identity": ((16, 8), lambda w: jnp.eye(16)[IDS] @ w, (0,), (1,)),
    "rows of heads": ((16, 2, 4), lambda w: w[IDS], (0,), (1, 2)),
    "rows of heads, tied": (
        (16, 2, 4), lambda w: jnp.einsum("bthk,vhk->btv", w[IDS], w), (0,), (1, 2)
    ),
}  # fmt: skip
CASES = [("kernel", n, *case) for n, case in KERNELS.items()]
CASES += [("embedding", n, *case) for n, case in TABLES.items()]


@pytest.mark.parametrize("case", CASES, ids=[case[1] for case in CASES])
def test_axes_follow_from_the_trace(case):
    leaf, _, shape, form, rows, cols, *batch = case
    params = {"m": {leaf: array(*shape, seed=1)}}

    def fn(params):
        return form(params["m"][leaf])

    adapted = wrapped(params, ["m"], sites=tied_lora.trace(fn, params))
    [group] = adapted.plan.adapted
    assert (group.rows, group.cols, group.batch) == (rows, cols, *(batch or [()]))
    assert group.is_table == (leaf == "embedding")
    assert {r.served for r in check(fn, adapted).reads} == {"low rank"}


@pytest.mark.parametrize("low", [jnp.bfloat16, jnp.float16])
def test_positions_in_low_precision(low):
    adapted = wrapped({"wpe": {"embedding": array(16, 8, seed=1, dtype=low)}}, ["wpe"])

    def fn(params, x):
        return x + params["wpe"]["embedding"][None, :3]

    [read] = check(fn, adapted, X.astype(low)).reads
    assert (read.site.operation, read.served) == ("add", "low rank")


@pytest.mark.parametrize("kind", ["dora", "rows"])
def test_positions_of_other_adapters(kind):
    adapted = wrapped({"wpe": {"embedding": array(16, 8, seed=1)}}, ["wpe"], kind=kind)
    check(lambda p, x: x + p["wpe"]["embedding"][None, :3], adapted, X)


class Transformed(nn.Module):
    """Attention's kernels in stacked, rematerialised layers, mapped over a batch."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                heads = nn.DenseGeneral((3, 2, 4), use_bias=False, name="qkv")(x)
                q, k, v = heads[..., 0, :, :], heads[..., 1, :, :], heads[..., 2, :, :]
                out = nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="out")(q * k + v)
                return x + out, None

        stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Step), length=2, **stacked)(name="layers")(x, None)[0]


def test_under_jit_scan_checkpoint_and_vmap():
    model = Transformed()
    params = init(model, X[0])
    run = jax.jit(jax.vmap(lambda p, x: model.apply({"params": p}, x), (None, 0)))
    sites = tied_lora.trace(run, params, X)
    config = tied_lora.LoraConfig(
        r=2, target_modules=["qkv", "out"], parts={"qkv": (2, ["q", "k", "v"])}
    )
    adapted = perturbed(tied_lora.wrap(params, config, sites=sites))
    axes = {g.key: (g.rows, g.cols, g.batch) for g in adapted.plan.adapted}
    assert axes == {
        "layers/qkv/kernel": ((1,), (2, 3, 4), (0,)), "layers/out/kernel": ((1, 2), (3,), (0,))
    }  # fmt: skip
    assert {r.served for r in check(run, adapted, X).reads} == {"low rank"}
