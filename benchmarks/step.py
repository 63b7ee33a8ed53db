"""A training step on the GPT-2 shape: tied, beside attention only, by hand, and densified.

python benchmarks/step.py                              4 layers, 2 x 128 tokens
python benchmarks/step.py --layers 12                  GPT-2 small whole
python benchmarks/step.py --batch 8 --length 512
"""

from __future__ import annotations

import dataclasses

import _harness
import _models

PAIRS = [("densified", "tied"), ("tied", "tied by hand")]


def measured(cases: dict[str, _models.Step | _models.Value], rounds: int) -> dict[str, object]:
    """Returns the figures of peers of "attention only", interleaved."""
    first = {name: float(case()) for name, case in cases.items()}
    _harness.check_equal({n: x for n, x in first.items() if n.startswith(("tied", "densified"))})
    seconds = _harness.interleaved(cases, rounds)
    pairs = [(n, "attention only") for n in cases if n != "attention only"]
    pairs += [pair for pair in PAIRS if set(pair) <= set(cases)]
    return {
        "rounds": rounds,
        "first losses": first,
        "median seconds": _harness.medians(seconds),
        **_harness.costs({name: case.compiled for name, case in cases.items()}),
        "ratios": {f"{a} / {b}": _harness.ratio(seconds, a, b) for a, b in pairs},
    }


def main() -> None:
    parser = _harness.parser(__doc__, rounds=21)
    for field in ("layers", "batch", "length"):
        parser.add_argument(f"--{field}", type=int)
    args = parser.parse_args()
    usual = _models.TINY if args.tiny else _models.Shape()
    given = {f: getattr(args, f) for f in ("layers", "batch", "length") if getattr(args, f)}
    shape = dataclasses.replace(usual, **given)
    what = (
        f"one training step, {shape.layers} layers of GPT-2's width {shape.width}, vocabulary "
        f"{shape.vocabulary}, {shape.batch} x {shape.length} tokens, float32, rank 8, AdamW"
    )
    suffix = "".join(f"-{field}{value}" for field, value in given.items())
    _harness.store(f"step{suffix}", {"what": what, **measured(_models.cases(shape), args.rounds)})


if __name__ == "__main__":
    main()
