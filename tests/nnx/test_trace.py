"""Call sites of a module: trace and explain, of each of its methods."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.nnx_models import (
    TOKENS,
    WIDTH,
    Stateful,
    adapted,
    close,
    shared_variable,
    wrapped,
)


class TestTraceAndExplain:
    def test_trace(self):
        sites = tied_lora.nnx.trace(shared_variable(), TOKENS)
        assert [s.role for s in sites.of("embed_tokens/embedding")] == ["lookup", "projection"]
        model = tied_lora.nnx.wrap(
            shared_variable(), tied_lora.LoraConfig(r=2, target_modules="all-linear"), sites=sites
        )
        assert [g.key for g in model.plan.adapted] == ["up/kernel"]
        assert tied_lora.nnx.trace(model, TOKENS) == sites

    def test_methods(self):
        model = adapted()
        reads = tied_lora.nnx.explain(model, TOKENS, method="encode").reads
        assert [r.site.leaf for r in reads] == ["embed_tokens/embedding", "up/kernel"]
        x = jnp.ones((1, WIDTH))
        for method in ("up", "up.__call__", lambda module, x: module.up(x)):
            (read,) = tied_lora.nnx.explain(model, x, method=method).reads
            assert read.served == "low rank"
            assert read.site.leaf == "up/kernel"

    def test_nothing_is_changed(self):
        module = Stateful(nnx.Rngs(0))
        model = wrapped(module, ["lin"])
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.RngCount, nnx.BatchStat))
        tied_lora.nnx.explain(model, TOKENS)
        tied_lora.nnx.trace(model, TOKENS)
        close(nnx.state(model, nnx.RngCount, nnx.BatchStat), before, 0)
