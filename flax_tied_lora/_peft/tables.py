"""Which parameter of PyTorch is the table of input embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from flax_tied_lora._names.layout import TorchWeight
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._ties.sources import EMBEDDINGS

# {PyTorch name: the leaf's path, and where in it}
Parameters = Mapping[str, tuple[str, TorchWeight]]


def table_of(made: Parameters, names: Names) -> str | None:
    """Returns the PyTorch name of the input embedding, or None."""
    tied = [w.name for tie in names.ties for w in [names.own_weight(tie)] if w.name in made]
    named = [
        n for n, (_, w) in made.items()
        if w.kind == "embedding" and w.module.rpartition(".")[2] in EMBEDDINGS
    ]  # fmt: skip
    return next((n for n in [*tied, *named] if len(made[n][1].dims) == 2), None)
