"""Checkpoints with Orbax: adapters and the state of their training, or full params with their ties.

An adapter checkpoint holds the adapters, their scaling, the plan (with the config in it), a
fingerprint of the base, the step, and as asked the optimizer's state and anything else; not the
base. `save` and `restore` are for one checkpoint; `Manager` keeps the latest few of a run and
saves in the background. Both write the same files, an Orbax checkpoint of several items, each of
which Orbax reads without this library, too.
"""

from flax_tied_lora._checkpoint.adapters import Restored as Restored
from flax_tied_lora._checkpoint.adapters import restore as restore
from flax_tied_lora._checkpoint.adapters import save as save
from flax_tied_lora._checkpoint.full_params import restore_params as restore_params
from flax_tied_lora._checkpoint.full_params import save_params as save_params
from flax_tied_lora._checkpoint.manager import Manager as Manager
from flax_tied_lora._checkpoint.stored import CheckpointError as CheckpointError

__all__ = [
    "CheckpointError",
    "Manager",
    "Restored",
    "restore",
    "restore_params",
    "save",
    "save_params",
]
