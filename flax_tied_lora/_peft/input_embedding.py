"""Which PyTorch parameter is the table of input embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from flax_tied_lora._names.layout import MATRIX, TorchWeight
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._ties.sources import EMBEDDINGS

# {PyTorch name: (path of the leaf, where in the leaf)}
ParametersByName = Mapping[str, tuple[str, TorchWeight]]


def input_embedding(parameters: ParametersByName, names: Names) -> str | None:
    """Returns the PyTorch name of the input embedding, or None where no parameter is one."""
    tied = [w.name for w in map(names.own_weight, names.ties) if w.name in parameters]
    named = [
        name for name, (_, w) in parameters.items()
        if w.kind in ("embedding", MATRIX) and w.module.rpartition(".")[2] in EMBEDDINGS
    ]  # fmt: skip
    return next((n for n in [*tied, *named] if len(parameters[n][1].dims) == 2), None)
