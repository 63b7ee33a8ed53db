"""How a model's Flax leaf paths and its PyTorch parameter names correspond, both ways.

`names_of` returns the table of names of a family (`FAMILIES` lists them): transformers' Flax GPT-2,
GPT-Neo, OPT, BLOOM, Llama, Mistral, Gemma, BERT, RoBERTa, T5 and BART, tunix's Qwen 2 and 3,
Llama 3, Gemma 2 and 3, DeepMind's Gemma 2 and 3, MaxText's Llama, Qwen 3, Gemma 2 and 3, KerasHub's
Llama 3, Qwen 3 and Gemma 1 to 3, T5X's T5 and UMT5. For any other model you give the table, a line
for each kind of leaf. `to_state_dict` and `from_state_dict` convert whole params with it, and
`flax_tied_lora.peft` reads and writes adapters with it::

    names = names_of("gpt2")
    names.to_torch("transformer/h/0/attn/c_attn/kernel", 2)[0].name
    state_dict = to_state_dict(params, names)

A line is ``(Flax path, PyTorch name)``, followed by a layout and a kind where they do not follow
from the leaf's name. ``{}`` stands for a number. The layout has the leaf's axes on the left and the
parameter's on the right; axes in brackets are flattened into one::

    ("layers_{}/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight")
    ("layers_{}/attn/q/kernel", "model.layers.{}.self_attn.q_proj.weight",
     "in heads dim -> (heads dim) in")

Where a leaf is several parameters, there is either a line for each, with an index in place of the
axis along which the leaf is sliced, or one line with a placeholder of the PyTorch name there::

    ("layers_{}/attn/kv", "model.layers.{}.self_attn.k_proj.weight", "0 heads in dim -> (heads dim) in")
    ("layers_{}/attn/kv", "model.layers.{}.self_attn.v_proj.weight", "1 heads in dim -> (heads dim) in")
    ("layers/mlp/up/kernel", "model.layers.{layer}.mlp.up_proj.weight", "{layer} in out -> out in")

A dict behind them has the maps of axes, by their name in the layout, where a library stores its
leaf otherwise than axis by axis: `Scale`, `Offset`, `Permutation`, `Interleaved`, `Padding`, or
several::

    ("layers_{}/attn/q/kernel", "model.layers.{}.self_attn.q_proj.weight",
     "in heads dim -> (heads dim) in", {"dim": (Interleaved(), Scale(8.0))})

Without a layout, a leaf called ``kernel`` is [in, out] and transposed in PyTorch, one whose name
ends with ``embedding`` is [rows, columns] in both, and any other leaf has one axis. Whether a
matrix is an embedding or a linear layer is said by a kind, or by call sites; not by a name.

A model whose modules are called as in PyTorch needs no table: `names_of_leaves` makes one of its
params. Keras passes params as a list: `by_path` makes a dict of them, with the variables' paths for leaf paths,
and `in_order` the list again.
"""  # noqa: E501 - a table reads best a line a line

from flax_tied_lora._names.axis_map import AxisMap as AxisMap
from flax_tied_lora._names.axis_maps import Interleaved as Interleaved
from flax_tied_lora._names.axis_maps import Offset as Offset
from flax_tied_lora._names.axis_maps import Padding as Padding
from flax_tied_lora._names.axis_maps import Permutation as Permutation
from flax_tied_lora._names.axis_maps import Scale as Scale
from flax_tied_lora._names.from_leaves import names_of_leaves as names_of_leaves
from flax_tied_lora._names.layout import TorchWeight as TorchWeight
from flax_tied_lora._names.layout import from_torch_array as from_torch_array
from flax_tied_lora._names.layout import from_torch_arrays as from_torch_arrays
from flax_tied_lora._names.layout import to_torch_array as to_torch_array
from flax_tied_lora._names.mapping import Names as Names
from flax_tied_lora._names.mapping import Tie as Tie
from flax_tied_lora._names.mapping import UnmappedError as UnmappedError
from flax_tied_lora._names.names_of import FAMILIES as FAMILIES
from flax_tied_lora._names.names_of import names_of as names_of
from flax_tied_lora._names.state_dict import Entry as Entry
from flax_tied_lora._names.state_dict import from_state_dict as from_state_dict
from flax_tied_lora._names.state_dict import state_entries as state_entries
from flax_tied_lora._names.state_dict import to_state_dict as to_state_dict
from flax_tied_lora._names.variables import by_path as by_path
from flax_tied_lora._names.variables import in_order as in_order

__all__ = [
    "FAMILIES",
    "AxisMap",
    "Entry",
    "Interleaved",
    "Names",
    "Offset",
    "Padding",
    "Permutation",
    "Scale",
    "Tie",
    "TorchWeight",
    "UnmappedError",
    "by_path",
    "from_state_dict",
    "from_torch_array",
    "from_torch_arrays",
    "in_order",
    "names_of",
    "names_of_leaves",
    "state_entries",
    "to_state_dict",
    "to_torch_array",
]
