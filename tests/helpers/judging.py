"""How far an adapted result may be from the merged one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

# Relative to the largest entry of the array compared, or 1.
FLOAT32_TOLERANCE = 2e-5
# In units of bfloat16's rounding: what an adapted error may have beyond twice the merged one's, in
# gradients of the adapted argument; and in results and gradients of data, which are sums of two
# rounded parts, the weight's and the delta's, each of which may be larger than the sum.
BFLOAT16_FLOOR = 2.0
BFLOAT16_FLOOR_OF_SUMS = 3.0
_EPS = float(jnp.finfo(jnp.bfloat16).eps)


def assert_close(
    name: str, ours: np.ndarray, theirs: np.ndarray, truth: np.ndarray | None = None,
    least: float = 0.0,
) -> None:  # fmt: skip
    """Fails where an adapted result is further from the merged one than rounding explains.

    Args:
      name: of the result; gradients are called ``gradient of ...``.
      truth: of what is of lower precision, the result in float32.
      least: the size, at the least, that a rounding of ``truth`` is relative to.
    """
    if not jnp.issubdtype(ours.dtype, jnp.floating):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        return
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs), err_msg=name)
    there = np.isfinite(theirs)
    if truth is None:
        size = max(1.0, np.max(np.abs(theirs), where=there, initial=0.0))
        error = np.max(np.abs(ours - theirs), where=there, initial=0.0)
        assert error <= FLOAT32_TOLERANCE * size, (
            f"{name}: differs by {error:.3g}, the largest entry being {size:.3g}\n"
            f"adapted:\n{ours}\nmerged:\n{theirs}"
        )
        return
    truth = truth.astype(np.float64)
    size = np.max(np.abs(truth), where=there, initial=least)
    mine, other = _rms(ours - truth, there), _rms(theirs - truth, there)
    floor = BFLOAT16_FLOOR if name.startswith("gradient of [0]") else BFLOAT16_FLOOR_OF_SUMS
    assert mine <= 2 * other + floor * _EPS * size, (
        f"{name}: error {mine:.3g}, of the merged function {other:.3g}, the largest entry being "
        f"{size:.3g}\nadapted:\n{ours}\nmerged:\n{theirs}\nin float32:\n{truth}"
    )


def _rms(x: np.ndarray, there: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x), where=there))) if np.any(there) else 0.0
