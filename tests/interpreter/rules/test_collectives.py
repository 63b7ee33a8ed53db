"""Collectives of weights inside a `shard_map`: the factors are gathered or moved, and no weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array, check, labelled

P = jax.P
MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
BOTH = ("data", "model")


def mapped(form: Any, spec: P, out: P, check_vma: bool = True) -> Any:
    """Returns a function in which each device multiplies its data with what a collective gives."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        def local(w: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.tensordot(jnp.resize(x, (3, form(w).shape[0])), form(w), 1)

        return jax.shard_map(
            local, mesh=MESH, in_specs=(spec, P(BOTH)), out_specs=out, check_vma=check_vma
        )(params["dense"]["kernel"], x)

    return fn


X = array(12, 8, seed=3)
ROWS, COLUMNS = P("data", None), P(None, "data")
# name -> what is done to the local part, and how the weight is split.
SERVED = {
    "rows": (lambda w: lax.all_gather(w, "data", axis=0, tiled=True), ROWS),
    "columns": (lambda w: lax.all_gather(w, "data", axis=1, tiled=True), COLUMNS),
    "over two axes": (lambda w: lax.all_gather(w, BOTH, axis=0, tiled=True), P(BOTH)),
    "along a new axis": (
        lambda w: lax.all_gather(w, "data", axis=1).transpose(1, 0, 2).reshape(-1, w.shape[1]),
        ROWS,
    ),
    "transposed": (lambda w: lax.all_gather(w.T, "data", axis=1, tiled=True).T, ROWS),
    "split otherwise": (lambda w: lax.all_to_all(w, "data", 1, 0, tiled=True), ROWS),
    "split otherwise, columns": (lambda w: lax.all_to_all(w, "data", 0, 1, tiled=True), COLUMNS),
    "rows mixed": (lambda w: lax.all_to_all(w, "data", 0, 0, tiled=True), ROWS),
    "summed, columns kept": (
        lambda w: lax.psum_scatter(w, "data", scatter_dimension=1, tiled=True), ROWS,
    ),
    "summed, rows kept": (
        lambda w: lax.psum_scatter(w, "data", scatter_dimension=0, tiled=True), ROWS,
    ),
    "passed on": (lambda w: lax.ppermute(w, "data", [(0, 1), (1, 0)]), ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_factors_are_moved(name):
    form, spec = SERVED[name]
    adapted = labelled((8, 12), (0,), (1,))
    explained = check(mapped(form, spec, P(BOTH)), adapted, X)
    assert {r.served for r in explained.reads} == {"low rank"}


@pytest.mark.parametrize("kind", ["dora", "rows", "copy"])
@pytest.mark.parametrize("name", ["rows", "columns", "along a new axis"])
def test_other_kinds_of_adapters(name, kind):
    form, spec = SERVED[name]
    adapted = labelled((8, 12), (0,), (1,), kind=kind)
    check(mapped(form, spec, P(BOTH)), adapted, X, on_dense="allow")


# The factor that the collective needs is the same on all devices, or differs along another axis.
MATERIALISED = {
    "rows split, columns gathered": (
        lambda w: lax.all_gather(w, "data", axis=1, tiled=True), ROWS,
    ),
    "not split at all": (lambda w: lax.all_gather(w, "data", axis=0, tiled=True), P()),
    "both split": (lambda w: lax.all_gather(w, "data", axis=0, tiled=True), P(*BOTH)),
    "sum of what is the same": (
        lambda w: lax.psum_scatter(w, "data", scatter_dimension=0, tiled=True), P(),
    ),
    "passed on to some": (lambda w: lax.ppermute(w, "data", [(0, 1)]), ROWS),
    "in groups": (
        lambda w: lax.all_gather(
            w, "data", axis=0, tiled=True, axis_index_groups=[[0], [1]]
        ),
        ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MATERIALISED)
def test_others_are_right_and_reported(name):
    form, spec = MATERIALISED[name]
    adapted = labelled((8, 12), (0,), (1,))
    explained = check(mapped(form, spec, P(BOTH)), adapted, X, on_dense="allow")
    served = "low rank" if name == "both split" else "dense"
    assert served in {r.served for r in explained.reads}


@pytest.mark.parametrize("name", ["rows", "columns", "split otherwise", "passed on"])
def test_unchecked_it_is_not_known_what_differs(name):
    form, spec = SERVED[name]
    adapted = labelled((8, 12), (0,), (1,))
    explained = check(mapped(form, spec, P(BOTH), check_vma=False), adapted, X, on_dense="allow")
    assert {r.served for r in explained.reads if r.site.operation != "dot_general"} == {"dense"}


def test_fsdp_by_hand_gathers_no_delta():
    """A table and a kernel, gathered on each device before they are used: nothing else moves."""
    params = {"wte": array(96, 16, seed=0), "q": {"kernel": array(16, 16, seed=1)}}

    def model(params, tokens):
        def local(params, tokens):
            whole = jax.tree.map(lambda w: lax.all_gather(w, "data", axis=0, tiled=True), params)
            x = whole["wte"][tokens]
            return (x + x @ whole["q"]["kernel"]) @ whole["wte"].T

        specs = (P("data"), P("data"))
        return jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P("data"))(params, tokens)

    tokens = jnp.arange(8).reshape(2, 4)
    sites = tied_lora.trace(model, params, tokens)
    config = tied_lora.LoraConfig(r=2, target_modules=["wte", "q"], init_lora_weights=False)
    adapted = tied_lora.wrap(params, config, sites=sites)
    explained = check(model, adapted, tokens)
    explained.assert_tied()
    gathered = [
        eqn.outvars[0].aval.shape
        for eqn in _equations(jax.make_jaxpr(tied_lora.adapt(model))(adapted, tokens).jaxpr)
        if eqn.primitive.name == "all_gather"
    ]
    assert sorted(gathered) == [(16, 2), (16, 16), (96, 2), (96, 16)]


def _equations(jaxpr: Any) -> list[Any]:
    inner = [v for e in jaxpr.eqns for v in e.params.values() if hasattr(v, "eqns")]
    return [*jaxpr.eqns, *(e for j in inner for e in _equations(j))]
