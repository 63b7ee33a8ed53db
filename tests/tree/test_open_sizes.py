"""Sizes that are no numbers, and what they are taken for."""

from __future__ import annotations

import jax
import numpy as np

from flax_tied_lora._tree.open_sizes import SUPPOSED, is_open, numbers, supposed

B, T = jax.export.symbolic_shape("b, t")


def test_which_sizes_are_open():
    assert [is_open(n) for n in (B, 2 * B + 1, 3, np.int64(3), 0)] == [True, True, *[False] * 3]
    assert numbers([3, B, 5, B * T]) == [3, 5]


def test_what_an_open_size_is_taken_for():
    assert supposed() == 1
    assert supposed(3, 5) == 15
    assert supposed(3, B, T) == 3 * SUPPOSED * SUPPOSED
    assert supposed(B * T) == SUPPOSED
