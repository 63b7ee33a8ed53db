"""Many adapters over one base: stacked in slots, switched by an index, one for each example.

`stack` puts adapters into the slots of one `Adapted`, `put` replaces one of them, and `select` says
which is used; the index may be traced, so that one compiled function serves all of them::

    stacked = serving.stack([first, second])
    logits = apply({"params": serving.select(stacked, 1)}, tokens)

`per_example` calls a function of a batch with an adapter for each example; `adapter_axes` gives the
``in_axes`` with which `jax.vmap` does it.
"""

from flax_tied_lora._adapters.stack import adapter_axes as adapter_axes
from flax_tied_lora._adapters.stack import put as put
from flax_tied_lora._adapters.stack import select as select
from flax_tied_lora._adapters.stack import stack as stack
from flax_tied_lora._verbs.per_example import per_example as per_example

__all__ = [
    "adapter_axes",
    "per_example",
    "put",
    "select",
    "stack",
]
