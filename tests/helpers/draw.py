"""Hypothesis strategy for the programs of `programs.py`.

The shape and dtype of every value are kept while drawing, so that what is drawn is valid code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from tests.helpers.draw_calls import call
from tests.helpers.draw_reads import read
from tests.helpers.draw_rearranging import REARRANGING, SIMPLE
from tests.helpers.draw_values import Maker
from tests.helpers.programs import Leaf, Program


@st.composite
def programs(draw: Any) -> Program:
    """Draws a program."""
    leaf = draw(leaves())
    low = "bfloat16" if leaf.dtype == "bfloat16" else draw(
        st.sampled_from(["", "", "", "bfloat16", "float16"])
    )  # fmt: skip
    m, results = Maker(draw, low), []
    for _ in range(draw(st.integers(1, 2))):
        if leaf.tied and draw(st.booleans()):
            v = m.step('params["head"]["kernel"]', leaf.shape[::-1], leaf.dtype)
        else:
            place = '["embed"]["embedding"]' if leaf.tied else '["dense"]["kernel"]'
            v = m.step(f"params{place}", leaf.shape, leaf.dtype)
        chain = REARRANGING if draw(st.integers(0, 3)) == 0 else SIMPLE
        for _ in range(draw(st.integers(0, 3))):
            v = draw(st.sampled_from(chain))(m, v) or v
        if draw(st.integers(0, 2)) == 0:
            v = call(m, v, depth=2) or v
        if v.name[0] == "w":
            v = read(m, v)
        results.append(v)
        m.data.append(v)
    names = tuple(dict.fromkeys(v.name for v in results))
    return Program(leaf, tuple(m.arguments), tuple(m.steps), names, low)


@st.composite
def leaves(draw: Any) -> Leaf:
    """Draws a leaf: a tied table, a kernel of two axes, stacked or per-head kernels."""
    leaf = draw(_alone())
    return dataclasses.replace(leaf, slot=draw(st.sampled_from([*[None] * 6, 1, -1])))


@st.composite
def _alone(draw: Any) -> Leaf:
    kind = draw(st.sampled_from(["tied", "tied", "kernel", "3", "3", "4"]))
    rank, dtype = draw(st.integers(1, 2)), draw(st.sampled_from(["float32", "float32", "bfloat16"]))
    adapters = draw(st.sampled_from(["lora", "lora", "lora", "dora", "rows", "copy", "quantized"]))
    if kind == "tied":
        shape = draw(st.sampled_from([(6, 4), (8, 3), (4, 6)]))
        return Leaf(shape, dtype, rank, kind=adapters)
    ndim = 2 if kind == "kernel" else int(kind)
    shape = tuple(draw(st.sampled_from([2, 3, 4])) for _ in range(ndim))
    labels = draw(st.permutations([*"rc", *draw(st.sampled_from(["bb", "rb", "cb", "rc"]))][:ndim]))
    rows, cols = (tuple(i for i, x in enumerate(labels) if x == side) for side in "rc")
    if adapters == "rows" and (ndim > 2 or shape[cols[0]] < 3):
        adapters = "lora"  # tokens are along one axis, and two of them are not to be all there is
    return Leaf(shape, dtype, rank, rows, cols, adapters)
