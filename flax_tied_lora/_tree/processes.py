"""Several processes with one mesh: arrays spread over them, and what one of them does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_tied_lora._tree.paths import is_tracer


def spread(leaf: Any) -> bool:
    """Returns whether parts of an array, or of a pytree's, are on devices of other processes."""
    arrays = (x for x in jax.tree.leaves(leaf) if isinstance(x, jax.Array))
    return any(not is_tracer(x) and not x.is_fully_addressable for x in arrays)


def gathered(tree: Any) -> Any:
    """Returns a pytree whose spread arrays are NumPy's, whole; others are left as they are.

    All processes have to call it, as they have to call a compiled function of such arrays.
    """

    def one(array: Any) -> Any:
        return multihost_utils.process_allgather(array, tiled=True) if spread(array) else array

    return jax.tree.map(one, tree)


def refuse_spread(what: str, path: str, leaf: Any) -> None:
    """Raises a ValueError for a leaf of which other processes hold parts."""
    if spread(leaf):
        raise ValueError(
            f"{what}: leaf {path!r} is spread over the devices of {jax.process_count()} processes, "
            "expected one whose parts are all here. Have each process write its parts, "
            "checkpoint.save_params, and read them in a single process, checkpoint.restore_params"
        )


def in_one_process(write: Callable[[], None], failed: Callable[[], Exception]) -> None:
    """Calls a function in process 0, while the others wait.

    Args:
      write: takes part in no computation of several processes.
      failed: makes what is raised in the others where it fails.

    Raises:
      Exception: in process 0, what ``write`` raises; in the others, what ``failed`` returns.
    """
    if jax.process_count() == 1:
        write()
        return
    error = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as raised:
            error = raised
    if error is None and multihost_utils.broadcast_one_to_all(np.array(0)) != 0:
        raise failed()
    if error is not None:
        multihost_utils.broadcast_one_to_all(np.array(1))
        raise error


def differing(numbers: Any) -> np.ndarray:
    """Returns which of some numbers, [n] of uint32, differ between processes, [n] of bool."""
    if jax.process_count() == 1 or not len(numbers):
        return np.zeros(len(numbers), bool)
    everywhere = multihost_utils.process_allgather(np.asarray(numbers, np.uint32))
    return np.any(everywhere != everywhere[0], axis=0)
