"""What a loss is called with: what is refused, and what is taken that is no JAX array."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.losses import linear_cross_entropy
from tests.helpers.full_logits import assert_same, cross_entropy
from tests.helpers.oracle import array, numbers

V, D, TOKENS = 17, 6, (3, 9)
HIDDEN, TABLE, BIAS = array(*TOKENS, D, seed=2), array(V, D, seed=1), array(V, seed=3)
LABELS = numbers(*TOKENS, below=V).at[0, 2:5].set(-100)
WEIGHTS = jnp.abs(array(*TOKENS, seed=4))


GOOD: dict[str, Any] = {"hidden": HIDDEN, "table": TABLE, "labels": LABELS}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": LABELS}, TypeError, "hidden is int32; expected floating point"),
        ({"table": jnp.ones((V, D), int)}, TypeError, "table is int32"),
        ({"labels": jnp.ones(TOKENS)}, TypeError, "labels are float32; expected integers"),
        ({"labels": jnp.ones(TOKENS, bool)}, TypeError, "labels are bool"),
        ({"table": BIAS}, ValueError, "two axes"),
        ({"table": TABLE.T}, ValueError, "with vocab_axis=1 it fits"),
        ({"hidden": HIDDEN[..., :4]}, ValueError, r"expected hidden \[\.\.\., 6\]$"),
        ({"hidden": jnp.float32(1)}, ValueError, "hidden has shape"),
        ({"labels": LABELS[:2]}, ValueError, r"labels have shape \(2, 9\); expected \(3, 9\)"),
        ({"weights": WEIGHTS[0]}, ValueError, r"weights has shape \(9,\); expected \(3, 9\)"),
        ({"weights": WEIGHTS.astype(complex)}, TypeError, "weights are complex64"),
        ({"bias": BIAS[:5]}, ValueError, r"bias has shape \(5,\); expected \(17,\)"),
        ({"vocab_axis": 2}, ValueError, "vocab_axis=2; expected 0"),
        ({"vocab_axis": True}, ValueError, "vocab_axis=True"),
        ({"reduction": "average"}, ValueError, "'average'; expected 'mean', 'sum' or 'none'"),
        ({"ignore_index": 0.5}, ValueError, "ignore_index=0.5"),
        ({"ignore_index": 2**31}, ValueError, "an int32"),
        ({"label_smoothing": 1.0}, ValueError, "from 0 up to, not including, 1"),
        ({"label_smoothing": "0.1"}, ValueError, "a Python number"),
        ({"z_loss": -1e-4}, ValueError, "z_loss=-0.0001"),
        ({"z_loss": float("nan")}, ValueError, "z_loss=nan"),
        ({"logit_soft_cap": 0}, ValueError, "above 0, or None"),
        ({"logit_scale": float("inf")}, ValueError, "finite"),
        ({"axis_name": 1}, ValueError, "the name of a mesh axis"),
        ({"chunk_size": -1}, ValueError, "1 or more"),
        ({"chunk_size": 0}, ValueError, "1 or more"),
        ({"chunk_size": 2.0}, ValueError, "chunk_size=2.0"),
    ],
    ids=str,
)
def test_what_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        linear_cross_entropy(**GOOD | change)


def test_an_adapted_is_refused_with_what_to_do():
    params = {"embed": {"embedding": TABLE}}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=2, target_modules=["embed"]))
    with pytest.raises(TypeError, match=r"table is an Adapted.*tied_lora\.adapt"):
        linear_cross_entropy(HIDDEN, adapted, LABELS)


def test_numpy_arrays_and_numbers_are_taken():
    value = linear_cross_entropy(
        np.asarray(HIDDEN), np.asarray(TABLE), np.asarray(LABELS, np.int16),
        weights=np.ones(TOKENS, np.int32), label_smoothing=float(np.float32(0.1)),
    )  # fmt: skip
    assert_same(value, cross_entropy(HIDDEN, TABLE, LABELS, label_smoothing=0.1))
