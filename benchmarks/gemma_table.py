"""A training step with Gemma-2-2B's table, 256,000 x 2,304, and two layers of that width."""

from __future__ import annotations

import dataclasses

import _harness
import _models
from step import measured

CAP = 30.0  # Gemma 2's, of the logits


def main() -> None:
    args = _harness.parser(__doc__).parse_args()
    shape = _models.TINY
    if not args.tiny:
        shape = dataclasses.replace(
            _models.Shape(), vocabulary=256_000, width=2304, heads=9, layers=2, positions=256
        )
    what = (
        f"one training step, a table of {shape.vocabulary} x {shape.width}, {shape.layers} layers "
        f"of that width in GPT-2's form, logits capped at {CAP:.0f}, {shape.batch} x "
        f"{shape.length} tokens, float32, rank 8, AdamW"
    )
    _harness.store(
        "gemma_table", {"what": what, **measured(_models.cases(shape, CAP), args.rounds)}
    )


if __name__ == "__main__":
    main()
