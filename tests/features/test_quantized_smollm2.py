"""SmolLM2-135M on a quantised base: bytes, memory of the compiled step, and held-out loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quantized

STEPS = 100


@pytest.mark.slow
def test_quantised_base_is_as_good_in_a_fraction_of_the_memory():
    exact = quantized.finetuned(quantized.FLOAT, STEPS)
    hidden, wide, kv = 576, 1536, 192
    layer = 4 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * wide)
    for qtype, share, nats in (("int8", 0.27, 0.05), ("nf4", 0.16, 0.2)):
        found = quantized.finetuned(qtype, STEPS)
        report = f"float32: {exact}; {qtype}: {found}"
        assert found["bytes"] <= share * exact["bytes"], report
        assert found["temporary"] <= exact["temporary"] + layer, report
        assert found["after"] < found["before"] - 0.1, report
        assert abs(found["after"] - exact["after"]) <= nats, report
