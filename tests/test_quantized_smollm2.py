"""SmolLM2-135M on a quantised base: bytes, memory of the compiled step, and held-out loss."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import corpus
import finetune_smollm2
import smollm2
import training

import flax_tied_lora as tied_lora

STEPS = 100
MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def usual_promotion():
    """transformers' Flax classes rely on it, also when they are only made."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def finetuned(qtype: str | None, output: Path) -> dict[str, float]:
    """Returns what the same steps on the demo's text come to."""
    options = ["--steps", str(STEPS), "--held-out-tokens", "3000", "--output", str(output)]
    args = finetune_smollm2.parser().parse_args(options + (["--quantize", qtype] if qtype else []))
    job = training.Job(args)
    sites = tied_lora.trace(job.apply_plain, job.params, jnp.zeros((2, 128), jnp.int32))
    config = tied_lora.LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=args.targets)
    adapted = tied_lora.wrap(job.params, config, sites=sites, ties=smollm2.TIES)
    explanation = tied_lora.explain(job.apply_plain, adapted, jnp.zeros((2, 128), jnp.int32))
    explanation.assert_tied()
    assert {r.served for r in explanation.reads} <= {"low rank", "quantised"}

    def loss(adapted: tied_lora.Adapted) -> float:
        batches = job.held_out.reshape(-1, args.batch, args.length + 1)
        return float(np.mean([job.loss(adapted, jnp.asarray(rows)) for rows in batches]))

    before, bytes_ = loss(adapted), tied_lora.stored_bytes(adapted)
    adapters, frozen = adapted.adapters, adapted.replace(adapters=None)
    state = job.optimizer.init(adapters)
    rows = map(jnp.asarray, corpus.batches(job.train_tokens, args.batch, args.length, 0, 0))
    step = job.train_step.lower(adapters, state, frozen, next(rows), 0).compile()
    for number, batch in enumerate(itertools.islice(rows, STEPS)):
        adapters, state, _ = step(adapters, state, frozen, batch, number)
    return {
        "bytes": bytes_, "temporary": step.memory_analysis().temp_size_in_bytes,
        "before": before, "after": loss(adapted.replace(adapters=adapters)),
    }  # fmt: skip


@pytest.mark.slow
def test_quantised_base_is_as_good_in_a_fraction_of_the_memory(tmp_path):
    exact = finetuned(None, tmp_path)
    hidden, wide, kv = 576, 1536, 192
    layer = 4 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * wide)
    for qtype, share, nats in (("int8", 0.27, 0.05), ("nf4", 0.16, 0.2)):
        found = finetuned(qtype, tmp_path)
        report = f"float32: {exact}; {qtype}: {found}"
        assert found["bytes"] <= share * exact["bytes"], report
        assert found["temporary"] <= exact["temporary"] + layer, report
        assert found["after"] < found["before"] - 0.1, report
        assert abs(found["after"] - exact["after"]) <= nats, report
