"""How a model's Flax leaf paths and its PyTorch parameter names correspond, both ways.

`names_of` returns the correspondence of a family: transformers' Flax GPT-2, GPT-Neo, OPT, BLOOM,
Llama, Mistral, Gemma, BERT, RoBERTa, T5 and BART, tunix's Qwen 2 and 3, Llama 3, Gemma 2 and 3, and
DeepMind's Gemma 2 and 3. For any other model people give a table of their own, one line for each
kind of leaf.

A line is ``(Flax path, PyTorch name)``, with a layout and a kind behind it where they do not follow
from the leaf's name. ``{}`` stands for a number. The layout has the leaf's axes on the left and the
parameter's on the right; several in brackets are one axis::

    ("layers_{}/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight")
    ("layers_{}/attn/q/kernel", "model.layers.{}.self_attn.q_proj.weight",
     "in heads dim -> (heads dim) in")

Where a leaf is several parameters, the axis along which it is sliced has an index in its place, a
line for each, or a placeholder of the PyTorch name::

    ("layers_{}/attn/kv", "model.layers.{}.self_attn.k_proj.weight", "0 heads in dim -> (heads dim) in")
    ("layers_{}/attn/kv", "model.layers.{}.self_attn.v_proj.weight", "1 heads in dim -> (heads dim) in")
    ("layers/mlp/up/kernel", "model.layers.{layer}.mlp.up_proj.weight", "{layer} in out -> out in")

Without a layout a leaf called ``kernel`` is [in, out] and turned round, one whose name ends with
``embedding`` is a table as it is, and any other has one axis.
"""  # noqa: E501 - a table reads best a line a line

from flax_tied_lora._names.layout import TorchWeight as TorchWeight
from flax_tied_lora._names.layout import from_torch_array as from_torch_array
from flax_tied_lora._names.layout import from_torch_arrays as from_torch_arrays
from flax_tied_lora._names.layout import to_torch_array as to_torch_array
from flax_tied_lora._names.mapping import Names as Names
from flax_tied_lora._names.mapping import Tie as Tie
from flax_tied_lora._names.mapping import UnmappedError as UnmappedError
from flax_tied_lora._names.names_of import FAMILIES as FAMILIES
from flax_tied_lora._names.names_of import names_of as names_of
from flax_tied_lora._names.state import Entry as Entry
from flax_tied_lora._names.state import from_state_dict as from_state_dict
from flax_tied_lora._names.state import state_entries as state_entries
from flax_tied_lora._names.state import to_state_dict as to_state_dict

__all__ = [
    "FAMILIES",
    "Entry",
    "Names",
    "Tie",
    "TorchWeight",
    "UnmappedError",
    "from_state_dict",
    "from_torch_array",
    "from_torch_arrays",
    "names_of",
    "state_entries",
    "to_state_dict",
    "to_torch_array",
]
