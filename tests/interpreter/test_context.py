"""What rules ask: whether rows are picked, what a read is called, and where in the model it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._adapters.terms import weights_of
from flax_tied_lora._interpreter.context import Context
from flax_tied_lora._interpreter.provenance import Provenance
from flax_tied_lora._interpreter.sites import CallSite, LeafInfo, Read
from flax_tied_lora._tree.paths import flatten
from tests.helpers.oracle import array, wrapped

LEAF = "embed/embedding"
ADAPTED = wrapped({"embed": {"embedding": array(8, 6, seed=1)}}, ["embed"])
WEIGHT = weights_of(ADAPTED, flatten(ADAPTED.params)[0])[LEAF]
MERGED = tied_lora.merge(ADAPTED)["embed"]["embedding"]
TABLE = LeafInfo((0,), (), True)
KERNEL = LeafInfo((0,), (), False)
X = array(3, 6, seed=2)


@pytest.mark.parametrize(
    ("info", "operation", "axis", "stays"),
    [
        (TABLE, "gather", 0, False),
        (KERNEL, "gather", 0, False),
        (LeafInfo((1,), (0,), False), "gather", 0, True),  # a layer of a stack
        (TABLE, "dynamic_slice", 0, False),
        (TABLE, "dynamic_slice", 1, True),  # some columns
        (KERNEL, "dynamic_slice", 0, True),
        (None, "gather", 0, False),
        (None, "dynamic_slice", 0, True),
    ],
)
def test_what_an_index_picks(info, operation, axis, stays):
    context = Context(leaves={} if info is None else {LEAF: info})
    assert context.stays_weight(operation, WEIGHT, [axis]) is stays


def test_which_products_are_lookups():
    jaxpr = jax.make_jaxpr(lambda x, i: (x, jax.nn.one_hot(i, 8)))(X, jnp.arange(3)).jaxpr
    data, one_hot = jaxpr.outvars
    provenance = Provenance()
    provenance.enter(jaxpr)
    for info, axis, operand, over, picks in (
        (TABLE, 1, data, 1, False),
        (TABLE, 0, data, 1, True),
        (KERNEL, 0, data, 1, False),
        (KERNEL, 0, one_hot, 1, True),
        (KERNEL, 0, one_hot, 0, False),
    ):
        context = Context(leaves={LEAF: info}, provenance=provenance)
        assert context.picks_rows(WEIGHT, [axis], operand, [over]) is picks


def test_a_function_of_weights_and_arrays():
    context = Context(leaves={LEAF: TABLE}, on_dense="error")
    found = context.evaluate(lambda w, x: {"y": x @ w.T}, WEIGHT, X)
    np.testing.assert_allclose(found["y"], X @ MERGED.T, rtol=1e-5, atol=1e-5)
    assert [(r.site.leaf, r.site.operation, r.served) for r in context.reads] == [
        (LEAF, "dot_general", "low rank")
    ]
    with pytest.raises(tied_lora.DensifyError, match="'embed/embedding' is handed back"):
        context.evaluate(lambda w: w.T, WEIGHT)


def test_reads_inside_an_equation_are_in_its_scope():
    context = Context(outside="Model", here="Model/layers")
    assert context.full_scope == "Model/Model/layers"
    inner = context.inside(reads := [], Provenance(), shown={"#0": LEAF})
    assert (inner.outside, inner.here, inner.reads) == ("Model/Model/layers", "", reads)
    assert inner.memo is context.memo
    inner.reads.append(Read(CallSite("#0", "gather", scope="embed"), "low rank", ("#0",)))
    context.met(inner.reads)
    assert [r.site.scope for r in context.reads] == ["Model/layers/embed"]


def test_a_read_takes_its_columns_from_what_is_left():
    context = Context(leaves={LEAF: TABLE})
    terms, _ = context.read("gather", WEIGHT, "lookup", rows=[0])
    assert len(terms) == 2
    (read,) = context.reads
    assert (read.site.role, read.site.rows, read.site.cols) == ("lookup", (0,), (1,))
    assert (read.served, read.groups) == ("low rank", (LEAF,))
