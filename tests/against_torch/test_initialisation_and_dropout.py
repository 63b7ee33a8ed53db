"""Against PEFT: how factors begin, and where dropout acts."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import flax_tied_lora as tied_lora
from tests.against_torch.torch_models import (
    NOT_ENSURED,
    TOKENS,
    WIDTH,
    factors,
    far,
    leaf,
    tied,
    torch_layer,
    torch_logits,
    with_peft,
)

pytestmark = pytest.mark.models


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_initialisation(both, init):
    """Which factor is zero, and the distribution of the other: judged by its bound and spread."""
    kind = both.kind
    fields: dict[str, Any] = {"r": 16, "init_lora_weights": init}
    ours = [kind.table.rpartition(".")[2], *(t.replace(".", "/") for t in kind.projections)]
    adapted = both.wrap(target_modules=ours, **fields)
    theirs = [kind.table.rpartition(".")[2], *kind.projections]
    expected_warnings = [NOT_ENSURED] if kind.tied_target == "embed_tokens" else []
    model = with_peft(both.torch(), *expected_warnings, target_modules=theirs, **fields)
    for group in adapted.plan.adapted:
        reference = factors(torch_layer(model, group.key))
        for name, found in adapted.adapters["lora"][group.key].items():
            expected = reference[name]
            assert found.shape == expected.shape
            if not expected.any():
                assert not np.any(found), (group.key, name)
                continue
            assert np.std(found) == pytest.approx(np.std(expected), rel=0.25), (group.key, name)
            # A uniform's largest is 1.73 deviations; a normal's, of so many draws, far above.
            ratio = np.abs(expected).max() / np.std(expected)
            assert (np.abs(found).max() / np.std(found) < 2) == (ratio < 2), (group.key, name)
            assert abs(np.mean(found)) < 0.3 * np.std(found)


def test_uniform_factor_has_pefts_bound(pairs):
    """kaiming_uniform(a=sqrt(5)) is uniform up to 1 / sqrt(inputs)."""
    both = pairs["llama"]
    adapted = both.wrap(r=16, target_modules=["q_proj", "down_proj"])
    model = with_peft(both.torch(), r=16, target_modules=["q_proj", "down_proj"])
    for group in adapted.plan.adapted:
        bound = 1 / math.sqrt(group.shape[0])
        for found in (
            adapted.adapters["lora"][group.key]["lora_a"],
            factors(torch_layer(model, group.key))["lora_a"],
        ):
            assert 0.97 * bound < np.abs(found).max() <= bound


def test_tied_factor_is_drawn_as_a_tables_here_and_as_a_heads_by_peft(both):
    """PEFT makes the head last, which draws the shared memory again as a kernel's is drawn."""
    fields: dict[str, Any] = {"r": 16, "target_modules": [both.kind.tied_target]}
    model = with_peft(both.torch(), ensure_weight_tying=True, **fields)
    theirs = factors(torch_layer(model, both.kind.key))
    assert not theirs["lora_a"].any()
    assert np.abs(theirs["lora_b"]).max() <= 1 / math.sqrt(WIDTH)
    ours = both.wrap(r=16, target_modules=[both.kind.table.rpartition(".")[2]])
    found = ours.adapters["lora"][both.kind.key]
    assert not np.any(found["lora_a"])
    assert np.std(found["lora_b"]) == pytest.approx(1.0, rel=0.15)


@pytest.mark.filterwarnings("ignore:adapt. .* is adapted and read nowhere in this call")
def test_dropout_is_on_the_input_of_projections_and_on_no_lookup(pairs):
    both = pairs["llama"]
    key, q_proj = both.kind.key, "model/layers/0/self_attn/q_proj/kernel"
    adapted, model = tied(both, lora_dropout=0.4)
    x = 0.5 * np.random.default_rng(2).standard_normal((4, WIDTH)).astype(np.float32)
    model.train()

    def lookup(params: Any) -> Any:
        return leaf(params, key)[TOKENS]

    def project(params: Any) -> Any:
        return x @ leaf(params, q_proj)

    def head(params: Any) -> Any:
        return x @ params["lm_head"]["kernel"]

    def draws(fn: Any, number: int) -> np.ndarray:
        keys = jax.random.split(jax.random.key(0), number)
        apply = tied_lora.adapt(fn, on_dense="error")
        return np.asarray(jax.jit(jax.vmap(lambda k: apply(adapted.train(k))))(keys))

    def torch_draws(layer: Any, number: int) -> np.ndarray:
        with torch.no_grad():
            many = layer(torch.from_numpy(x).repeat(number, 1))
        return many.reshape(number, len(x), -1).numpy()

    # A lookup has none, in PEFT and here, though the table is the head's too.
    looked_up = draws(lookup, 2)
    np.testing.assert_array_equal(looked_up[0], looked_up[1])
    assert far(looked_up[0], tied_lora.adapt(lookup)(adapted)) < 1e-6
    with torch.no_grad():
        theirs = [torch_layer(model, key)(torch.from_numpy(TOKENS).long()) for _ in range(2)]
    assert torch.equal(*theirs)
    assert far(looked_up[0], theirs[0]) < 1e-5

    number = 4000
    for fn, layer in (
        (project, torch_layer(model, q_proj)),
        (head, model.base_model.model.lm_head),
    ):
        ours, reference = draws(fn, number), torch_draws(layer, number)
        exact = tied_lora.adapt(fn, on_dense="error")(adapted)
        # The mean over keys is the product without dropout; the spread is that of PEFT.
        spread = ours.std(0)
        assert np.all(spread > 0)
        assert np.all(np.abs(ours.mean(0) - exact) < 5.5 * spread / math.sqrt(number))
        np.testing.assert_allclose(spread, reference.std(0), rtol=0.12)
        # The base product has no dropout: what varies lies in the factors' columns.
        b = adapted.adapters["lora"][q_proj if fn is project else key]
        columns = np.asarray(b["lora_b"] if fn is project else b["lora_a"].T, np.float64)
        varying = (ours - np.asarray(exact)).reshape(-1, ours.shape[-1]).astype(np.float64)
        outside = varying - varying @ np.linalg.pinv(columns) @ columns
        assert np.abs(outside).max() < 1e-4 * np.abs(varying).max()


def test_dropout_is_off_without_a_key(both):
    adapted, model = tied(both, lora_dropout=0.4)
    with torch.no_grad():
        expected = torch_logits(model.eval())
    apply = jax.jit(tied_lora.adapt(both.logits, on_dense="error"))
    assert far(apply(adapted), expected) < 1e-4
    assert far(apply(adapted.train(jax.random.key(1))), expected) > 1e-2
    assert far(apply(adapted.train(jax.random.key(1)).eval()), expected) < 1e-4
    assert jnp.isfinite(apply(adapted.train(jax.random.key(2)))).all()
