"""A quantised base beside the float32 one: SmolLM2-135M, the demo's text, the same steps.

python benchmarks/quantized.py --steps 100

Prints and stores bytes, the compiled step's temporary memory, held-out losses and seconds a step
(median; one case after the other, so of the times only large differences mean anything).
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _harness
import corpus
import finetune
import jax
from job import Job, State

import flax_tied_lora as tied_lora

FLOAT = "float32"
MIB = 2**20


def finetuned(qtype: str, steps: int) -> dict[str, float]:
    """Returns what the same steps on a base come to."""
    options = ["--steps", str(steps), "--held-out-tokens", "3000"]
    options += ["--output", tempfile.gettempdir()]  # nothing is written
    options += [] if qtype == FLOAT else ["--quantize", qtype]
    args = finetune.options(options)
    job = Job(args)
    adapted = job.wrap(job.params)
    explanation = tied_lora.explain(job.plain_loss, adapted, *job.shapes())
    explanation.assert_tied()
    assert {r.served for r in explanation.reads} <= {"low rank", "plain", "quantised"}

    state = State(adapted, job.optimizer.init(adapted.adapters), 0, [], [], "")
    before = job.held_out_loss(adapted)
    key = jax.random.key(0)
    step = job.train_step.lower(adapted.train(key), state.opt_state, *job.shapes()).compile()
    seconds = []
    order = corpus.order(len(job.rows), args.batch, args.seed)
    for numbers in itertools.islice(order, steps):
        start = time.perf_counter()
        job.take_step(state, numbers)
        seconds.append(time.perf_counter() - start)
    return {
        "bytes": tied_lora.stored_bytes(adapted),
        "temporary": step.memory_analysis().temp_size_in_bytes,
        "before": before,
        "after": job.held_out_loss(state.adapted),
        "seconds": statistics.median(seconds),
    }


def main() -> None:
    parser = _harness.parser(__doc__, rounds=None)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--qtypes", nargs="+", default=["int8", "nf4", "int4"])
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.qtypes = 1, ["int8"]
    found: dict[str, Any] = {}
    print("| base | stored | of float32 | temporary memory | loss before | after | s / step |")
    print("|---|---|---|---|---|---|---|")
    for qtype in [FLOAT, *args.qtypes]:
        one = found[qtype] = finetuned(qtype, args.steps)
        share = one["bytes"] / found[FLOAT]["bytes"]
        print(
            f"| {qtype} | {one['bytes'] / MIB:.1f} MiB | {share:.3f} | "
            f"{one['temporary'] / MIB:.1f} MiB | {one['before']:.3f} | {one['after']:.3f} | "
            f"{one['seconds']:.2f} |",
            flush=True,
        )
    _harness.store("quantized", {"steps": args.steps, "bases": found})


if __name__ == "__main__":
    main()
