"""Products with data: every layout of dot_general, the leaf on either side, or on both."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import one_kernel
from tests.helpers.oracle import array, check, labelled, only, wrapped

TABLE = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
KERNEL = wrapped({"dense": {"kernel": array(6, 8, seed=1)}}, ["dense"])
X = array(3, 6, seed=2)


def table(params):
    return params["embed"]["embedding"]


LAYOUTS = {
    "x @ W.T": lambda w, x: x @ w.T,
    "W @ x.T": lambda w, x: w @ x.T,
    "einsum": lambda w, x: jnp.einsum("bd,vd->vb", x, w),
    "vector": lambda w, x: w @ x[0],
    "more axes of data": lambda w, x: jnp.einsum("btd,vd->btv", jnp.stack([x, -x]), w),
    "heads": lambda w, x: jnp.einsum("bhe,vhe->bv", x.reshape(3, 2, 3), w.reshape(8, 2, 3)),
    "heads kept": lambda w, x: jnp.einsum("bhe,vhe->bhv", x.reshape(3, 2, 3), w.reshape(8, 2, 3)),
    "columns as batch": lambda w, x: jnp.einsum("bd,vd->dbv", x, w),
    "outer": lambda w, x: jnp.einsum("b,vd->bvd", x[:, 0], w),
    "all summed": lambda w, x: jnp.einsum("bd,vd->", x, w),
    "scaled rows": lambda w, x: x @ (w * jnp.arange(8.0)[:, None]).T,
    "scaled columns": lambda w, x: x @ (w * jnp.arange(6.0)[None]).T,
    "highest precision": lambda w, x: jnp.matmul(x, w.T, precision="highest"),
    "another result dtype": lambda w, x: jnp.matmul(x, w.T, preferred_element_type=jnp.float32),
    "under vmap": lambda w, x: jax.vmap(lambda row: w @ row)(x),
    "vmap over rows": lambda w, x: jax.vmap(lambda row: x @ row)(w),
}


@pytest.mark.parametrize("form", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_table(form, dtype):
    adapted = wrapped({"embed": {"embedding": array(8, 6, seed=1, dtype=dtype)}}, ["embed"])

    def fn(params, x):
        with jax.numpy_dtype_promotion("standard"):  # scales above are float32
            return form(table(params), x)

    only(check(fn, adapted, X.astype(dtype)), "projection")


TURNED = wrapped({"embed": array(6, 8, seed=1), "head": array(6, 8, seed=1).T}, ["embed"],
                 ties=[("embed", "head")])  # fmt: skip


@pytest.mark.parametrize("form", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_table_that_is_stored_as_its_transpose(form):
    only(check(lambda params, x: form(params["head"], x), TURNED, X), "projection")


def test_rows_of_a_table_summed_over_are_a_lookup():
    """The role comes from what is contracted: weights of rows, one-hot or not, pick rows."""
    (read,) = only(check(lambda p, x: x @ table(p), TABLE, array(3, 8, seed=2)), "lookup")
    assert (read.site.rows, read.site.cols) == ((0,), (1,))


def test_kernel_both_ways():
    def fn(params, x, y):
        w = params["dense"]["kernel"]
        return x @ w, y @ w.T

    first, second = only(check(fn, KERNEL, X, array(2, 8, seed=3)), "projection")
    assert (first.site.rows, first.site.cols) == ((0,), (1,))
    assert (second.site.rows, second.site.cols) == ((1,), (0,))


def test_lookup_and_projection_of_one_leaf():
    ids = jnp.array([1, 5, 2])

    def fn(params, x):
        hidden = jnp.tanh(table(params)[ids] + x)
        return hidden @ table(params).T

    explained = check(fn, TABLE, X)
    explained.assert_tied()
    assert [r.site.role for r in explained.reads] == ["lookup", "projection"]


def test_transposed_member_of_a_tie():
    weight = array(8, 6, seed=1)
    adapted = wrapped(
        {"embed": {"embedding": weight}, "head": {"kernel": weight.T}}, ["embed"],
        ties=[("embed/embedding", "head/kernel")],
    )  # fmt: skip

    def fn(params, x):
        hidden = params["embed"]["embedding"][jnp.array([3, 4, 3])] + x
        return hidden @ params["head"]["kernel"]

    explained = check(fn, adapted, X)
    explained.assert_tied()
    assert [(r.site.leaf, r.site.role, r.site.rows) for r in explained.reads] == [
        ("embed/embedding", "lookup", (0,)), ("head/kernel", "projection", (0,)),
    ]  # fmt: skip


BOTH = {
    "W @ W.T": lambda w: w @ w.T,
    "W.T @ W": lambda w: w.T @ w,
    "row by row": lambda w: jnp.einsum("vd,vd->v", w, w),
    "all of it": lambda w: jnp.einsum("vd,vd->", w, w),
    "outer": lambda w: jnp.einsum("vd,we->vwde", w[:2], w[2:4]),
    "scaled": lambda w: (2.0 * w) @ (w * jnp.arange(6.0)[None]).T,
    "three times": lambda w: w @ (w.T @ w),
}


@pytest.mark.parametrize("form", BOTH.values(), ids=BOTH.keys())
def test_both_operands(form):
    explained = check(lambda params: form(table(params)), TABLE)
    assert {r.served for r in explained.reads} == {"low rank"}


@pytest.mark.parametrize("form", BOTH.values(), ids=BOTH.keys())
def test_both_operands_stored_as_their_transpose(form):
    explained = check(lambda params: form(params["head"]), TURNED)
    assert {r.served for r in explained.reads} == {"low rank"}


def test_both_leaves_of_a_transposed_tie():
    def fn(params):
        return params["head"] @ params["embed"], params["embed"] @ params["head"]

    explained = check(fn, TURNED)
    assert {r.served for r in explained.reads} == {"low rank"}


def test_both_operands_repeated_along_an_axis():
    def fn(params):
        w = jnp.broadcast_to(table(params)[..., None], (8, 6, 2))
        kept = jnp.tensordot(w, w, (1, 1))
        return kept, jnp.einsum("vdk,wdk->vw", w, w)

    explained = check(fn, TABLE, on_dense="allow")
    # Summed over the repeated axis is where it is added up.
    assert explained.reads[0].served == "low rank"


def test_two_leaves():
    params = {"a": {"kernel": array(6, 4, seed=1)}, "b": {"kernel": array(4, 5, seed=2)}}
    adapted = wrapped(params, ["a", "b"])
    explained = check(lambda p, x: x @ (p["a"]["kernel"] @ p["b"]["kernel"]), adapted, X)
    assert {r.site.leaf for r in explained.reads} == {"a/kernel", "b/kernel"}
    explained.assert_tied()


AXES = [
    (rows, cols)
    for labels in sorted(set(itertools.permutations("rrccbb", 3)))
    if "r" in labels and "c" in labels
    for rows, cols in [tuple(tuple(i for i, x in enumerate(labels) if x == s) for s in "rc")]
]


@pytest.mark.parametrize(("rows", "cols"), AXES)
def test_three_axes_in_every_labelling(rows, cols):
    """Rows, columns and batch may be any axes, and any of them may be summed over."""
    adapted = labelled((3, 4, 5), rows, cols)

    def fn(params, x, y):
        w = params["dense"]["kernel"]
        return [
            jnp.einsum("zabc,abc->z", y, w), jnp.einsum("zab,abc->zc", y[..., 0], w),
            jnp.einsum("zac,abc->azb", y[:, :, 0], w), jnp.einsum("abc,zbc->abz", w, y[:, 0]),
            jnp.einsum("abc,xc->xab", w, x), jnp.einsum("zabc,abc->zabc", y, w),
        ]  # fmt: skip

    explained = check(fn, adapted, array(2, 5, seed=2), array(2, 3, 4, 5, seed=3), on_dense="allow")
    assert [r.served for r in explained.reads][:5] == ["low rank"] * 5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_kernels(dtype):
    """Heads: [d, heads, head_dim] in, [heads, head_dim, d] out."""
    query = labelled((6, 2, 3), (0,), (1, 2), dtype=dtype)
    output = labelled((2, 3, 6), (0, 1), (2,), dtype=dtype)
    x = X.astype(dtype)

    def project(params, x):
        return jnp.einsum("td,dhe->the", x, params["dense"]["kernel"])

    def back(params, x):
        return jnp.einsum("the,hed->td", x.reshape(3, 2, 3), params["dense"]["kernel"])

    (read,) = only(check(project, query, x), "projection")
    assert (read.site.rows, read.site.cols) == ((0,), (1, 2))
    (read,) = only(check(back, output, x), "projection")
    assert (read.site.rows, read.site.cols) == ((0, 1), (2,))


def test_of_data_that_is_constant_along_an_axis():
    def fn(params, x):
        return lax.dot_general(jnp.ones((3, 6)), table(params), (((1,), (1,)), ((), ()))) * x[:, :1]

    only(check(fn, TABLE, X), "projection")


def test_cheaper_order():
    """Few rows of data go through the thin factors; the delta is never made at full size."""
    wide = wrapped({"dense": {"kernel": array(64, 96, seed=1)}}, ["dense"], r=4)
    (read,) = check(lambda p, x: x @ p["dense"]["kernel"], wide, array(5, 64, seed=2)).reads
    assert read.flops == 2 * 5 * 4 * (64 + 96)


def by_algorithm(name):
    precision = lax.DotAlgorithmPreset[name]
    return lambda p, x: lax.dot_general(
        x, p["dense"]["kernel"], (((1,), (0,)), ((), ())), precision=precision
    )


@pytest.mark.parametrize("name", ["F32_F32_F32", "BF16_BF16_F32"])
def test_a_named_algorithm(name):
    dtype = jnp.float32 if name.startswith("F32") else jnp.bfloat16
    adapted = labelled((8, 12), (0,), (1,), dtype=dtype)
    only(check(by_algorithm(name), adapted, array(3, 8, dtype=dtype)), "projection")


def test_a_named_algorithm_says_what_it_accumulates_in():
    """For a TPU: the CPU has none that accumulates in bfloat16."""
    adapted = labelled((8, 12), (0,), (1,), dtype=jnp.bfloat16)
    x = array(3, 8, dtype=jnp.bfloat16)
    traced = jax.jit(tied_lora.adapt(by_algorithm("BF16_BF16_BF16"))).trace(adapted, x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all(line.rstrip().endswith("bf16>") for line in products)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bool_, jnp.bfloat16, jnp.float8_e4m3fn])
def test_data_of_another_dtype_leaves_the_delta_its_precision(dtype):
    one_kernel.check(one_kernel.product((3 * one_kernel.X).astype(dtype)), on_dense="error")
