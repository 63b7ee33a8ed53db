"""Why a weight is added up: each operation named does that, and says so as the page does."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl

import flax_tied_lora as tied_lora
from flax_tied_lora._algebra.weight import MOST
from flax_tied_lora._interpreter.materialised import OTHERWISE, QUANTIZED, REASONS, reason_for
from tests.helpers.oracle import array, labelled

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
MATRIX = labelled((4, 4), (0,), (1,))
BATCHED = labelled((2, 4, 3), (1,), (2,))
X = array(4, 4, seed=2)
SHAPE = jax.ShapeDtypeStruct((4, 4), jnp.float32)


@jax.custom_jvp
def own_jvp(w):
    return 2.0 * w


@jax.custom_vjp
def own_vjp(w):
    return 2.0 * w


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), 2.0 * tangents[0]))
own_vjp.defvjp(lambda w: (own_vjp(w), None), lambda _, g: (2.0 * g,))


def _kernel(source, target):
    target[...] = 2.0 * source[...]


def many(w):
    """More deltas of one adapter than are kept side by side: no two of them share a factor."""
    return [w * (X[:1] + i) for i in range(MOST + 1)]


SAME_NAME = (
    "acos acosh asin asinh atan atanh cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 expm1 "
    "floor is_finite lgamma log log1p logistic rsqrt round sign sin sinh sqrt square tan tanh "
    "cumsum cummax cummin cumprod cumlogsumexp"
)
CASES = {name: getattr(lax, name) for name in re.findall(r"\w+", SAME_NAME)} | {
    "abs": lambda w: abs(w),
    "add": lambda w: w + X,
    "sub": lambda w: X - w,
    "argmax": lambda w: jnp.argmax(w, axis=0),
    "argmin": lambda w: jnp.argmin(w, axis=0),
    "atan2": lambda w: lax.atan2(w, X),
    "bitcast_convert_type": lambda w: lax.bitcast_convert_type(w, jnp.int32),
    "concatenate": lambda w: jnp.concatenate(many(w)),
    "cholesky": lambda w: lax.linalg.cholesky(w, symmetrize_input=False),
    "clamp": lambda w: lax.clamp(0.0, w, 1.0),
    "conv_general_dilated": lambda w: lax.conv_general_dilated(w[None], X[None], (1,), "SAME"),
    "convert_element_type": lambda w: w.astype(jnp.int32),
    "custom_jvp_call": own_jvp,
    "custom_vjp_call": own_vjp,
    "debug_callback": lambda w: jax.debug.callback(lambda a: None, w),
    "debug_print": lambda w: jax.debug.print("{}", w),
    "div": lambda w: w / X,
    "dynamic_update_slice": lambda w: lax.dynamic_update_slice(X, w, (0, 0)),
    "eig": lambda w: lax.linalg.eig(w),
    "eigh": lambda w: lax.linalg.eigh(w, symmetrize_input=False),
    "dot_general": lambda w: (w * X[:1] * X[:, :1]) @ X,
    "eq": lambda w: w == X,
    "ffi_call": lambda w: jax.ffi.ffi_call("no_such_call", SHAPE)(w),
    "gather": lambda w: jnp.take(
        jnp.broadcast_to(w, (3, 4, 4)), jnp.array([0, 5]), axis=0, mode="fill"
    ),
    "ge": lambda w: w >= X,
    "gt": lambda w: w > X,
    "le": lambda w: w <= X,
    "lt": lambda w: w < X,
    "ne": lambda w: w != X,
    "integer_pow": lambda w: w**3,
    "linear_cross_entropy": lambda w: tied_lora.losses.linear_cross_entropy(
        X, w * X[:1] * X[:, :1], jnp.arange(4)
    ),
    "lu": lambda w: lax.linalg.lu(w),
    "max": lambda w: lax.max(w, X),
    "min": lambda w: lax.min(w, X),
    "mul": lambda w: w * X,
    "io_callback": lambda w: io_callback(lambda a: a, SHAPE, w),
    "pallas_call": lambda w: pl.pallas_call(_kernel, SHAPE, interpret=True)(w),
    "pow": lambda w: lax.pow(w, X),
    "pure_callback": lambda w: jax.pure_callback(lambda a: a, SHAPE, w),
    "qr": lambda w: lax.linalg.qr(w),
    "ragged_dot_general": lambda w: lax.ragged_dot(w, X[None], jnp.array([4])),
    "reduce_max": lambda w: jnp.max(w),
    "reduce_min": lambda w: jnp.min(w),
    "reduce_precision": lambda w: lax.reduce_precision(w, 5, 2),
    "reduce_prod": lambda w: jnp.prod(w),
    "reduce_sum": lambda w: jnp.sum(w, axis=0),
    "rem": lambda w: lax.rem(w, X),
    "reshape": lambda w: w.reshape(16),
    "return": lambda w: w,
    "scan": lambda w: lax.scan(lambda c, x: (c * 2.0, c @ x), w, X)[1],
    "scatter": lambda w: X.at[0].set(w[0]),
    "scatter-add": lambda w: X.at[jnp.array([1, 1])].add(w[:2]),
    "select_n": lambda w: jnp.where(X > 0, w, 0.0),
    "sort": lambda w: jnp.sort(w),
    "stack": lambda w: lax.stack(many(w)),
    "svd": lambda w: lax.linalg.svd(w),
    "top_k": lambda w: lax.top_k(w, 2),
    "triangular_solve": lambda w: lax.linalg.triangular_solve(w, X),
    "while": lambda w: lax.while_loop(lambda c: c[0, 0] < 9, lambda c: 2.0 * c, w) @ X,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_adds_up(name):
    adapted = BATCHED if name == "reduce_sum" else MATRIX
    explained = tied_lora.explain(lambda p: CASES[name](p["dense"]["kernel"]), adapted)
    assert {r.site.operation for r in explained.reads if r.served == "dense"} == {name}


def test_each_operation_named_has_a_case():
    named = [name for reason in REASONS for name in reason.operations]
    assert len(set(named)) == len(named)
    # Names of other releases, and of backward passes.
    assert set(named) == {*CASES, "ragged_dot", "add_any"}


def test_the_page_has_these_reasons_and_no_others():
    rows = re.findall(r"^\| (.+) \| (`.+`) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(r.why, " ".join(f"`{n}`" for n in r.operations)) for r in REASONS]


@pytest.mark.parametrize("name", ["tanh", "return", "mul"])
def test_the_warning_says_it(name):
    function = tied_lora.adapt(lambda p: CASES[name](p["dense"]["kernel"]))
    with pytest.warns(tied_lora.DensifyWarning) as caught:
        function(MATRIX)
    assert [reason_for(name) in str(w.message) for w in caught] == [True]
    assert reason_for(name) != OTHERWISE == reason_for("an operation that nobody knows")


def test_page_gives_the_reason_of_quantised_weights():
    assert QUANTIZED in " ".join(PAGE.read_text().split())
