"""A saved plan is put on its own base only: what another one differs in is named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.saved_base import base_params, changed, without, wrapped

OPTIMIZER = optax.adam(0.1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "adapter"
    adapted = wrapped()
    state = OPTIMIZER.init(adapted.adapters)
    checkpoint.save(path, adapted, opt_state=state, extra={"rng": jax.random.key(1)})
    return path


def restore(path, params=None, **kwargs):
    return checkpoint.restore(path, base_params() if params is None else params, **kwargs)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: without("dense"), r"no 'dense/kernel' float32\[16, 16\], which the checkpoint's"),
        (lambda: without("head"), "the params have no 'head/kernel'"),
        (
            lambda: changed("dense/kernel", jnp.zeros((16, 8))),
            r"'dense/kernel' is float32\[16, 8\] in the params and float32\[16, 16\] in the",
        ),
        (
            lambda: changed("head/kernel", jnp.zeros((64, 16))),
            r"'head/kernel' is float32\[64, 16\] in the params and float32\[16, 64\] in",
        ),
        (
            lambda: changed("embed/embedding", jnp.zeros((64, 16), jnp.bfloat16)),
            r"'embed/embedding' is bfloat16\[64, 16\] in the params and float32",
        ),
        (wrapped, r"params is an Adapted; expected the base, tied_lora.base\(adapted\)"),
        (
            lambda: changed("dense/bias", jnp.zeros(15)),
            r"not the base .*'dense/bias' is float32\[15\], saved with float32\[16\]\. Load",
        ),
        (
            lambda: changed("dense/bias", base_params()["dense"]["bias"].at[3].set(1e-8)),
            "not the base of the adapters in .*adapter: 'dense/bias' has other values",
        ),
        (
            lambda: {**base_params(), "new": {"kernel": jnp.ones(2)}},
            "'new/kernel' is not in the saved base",
        ),
        (lambda: changed("dense/bias", None), "'dense/bias' is missing"),
        (
            lambda: jax.tree.map(lambda x: x * np.float32(1.01) + 1, base_params()),
            "values; 'dense/kernel' has other values; 'embed/embedding' has .*check_base=False",
        ),
    ],
)
def test_another_base(saved, params, message):
    with pytest.raises(CheckpointError, match=message):
        restore(saved, params())
