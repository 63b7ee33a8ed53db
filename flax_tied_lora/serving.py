"""Many adapters over one base: stacked in slots, switched by an index, one for each example."""

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
