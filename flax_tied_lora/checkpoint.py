"""Checkpoints with Orbax: adapters and the state of their training, or full params with their ties.

A checkpoint of adapters holds the adapters, their scaling, the plan with its config, a fingerprint
of the base, the step, and on request the optimizer's state and anything else; not the base::

    checkpoint.save("adapter", adapted, opt_state=state, step=100)
    adapted, state, step, extra = checkpoint.restore("adapter", params, opt_state=optimizer)

`save` and `restore` are for one checkpoint; a `Manager` keeps the latest few of a run and saves in
the background. Both write the same files: an Orbax checkpoint of several items, each of which Orbax
also reads without this library. `save_params` and `restore_params` are for full params.
"""

from flax_tied_lora._checkpoint.adapters import Restored as Restored
from flax_tied_lora._checkpoint.adapters import restore as restore
from flax_tied_lora._checkpoint.adapters import save as save
from flax_tied_lora._checkpoint.errors import CheckpointError as CheckpointError
from flax_tied_lora._checkpoint.full_params import restore_params as restore_params
from flax_tied_lora._checkpoint.full_params import save_params as save_params
from flax_tied_lora._checkpoint.manager import Manager as Manager

__all__ = [
    "CheckpointError",
    "Manager",
    "Restored",
    "restore",
    "restore_params",
    "save",
    "save_params",
]
