"""PEFT's adapter files, read and written, and merged models for PyTorch, written.

`save_adapter` writes what ``PeftModel.from_pretrained`` loads; `load_adapter` reads what PEFT's
``save_pretrained`` wrote; `save_merged` writes a model that transformers loads. None of them needs
PyTorch. `names_of` says how the names of the two frameworks correspond::

    names = peft.names_of("gpt2")
    adapted = peft.load_adapter("adapter", params, names)
    peft.save_adapter("copy", adapted, names)
"""

from flax_tied_lora._names.names_of import names_of as names_of
from flax_tied_lora._peft.adapter.load import load_adapter as load_adapter
from flax_tied_lora._peft.adapter.save import save_adapter as save_adapter
from flax_tied_lora._peft.adapter.served import ServingWarning as ServingWarning
from flax_tied_lora._peft.files.errors import AdapterFileError as AdapterFileError
from flax_tied_lora._peft.merged.export import save_merged as save_merged

__all__ = [
    "AdapterFileError",
    "ServingWarning",
    "load_adapter",
    "names_of",
    "save_adapter",
    "save_merged",
]
