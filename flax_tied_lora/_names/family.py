"""What is known of a family of models, for its table of names."""

from __future__ import annotations

import dataclasses

from flax_tied_lora._names.line import Line


@dataclasses.dataclass(frozen=True)
class Family:
    """What is known of a family of models: its table of names, and which parameters are tied.

    Attributes:
      lines: the table of names.
      table: Flax path of the input embedding.
      shared: PyTorch modules that always share its weight.
      heads: PyTorch modules that share it where the config ties input and output.
      tied: whether a config that says nothing of it ties input and output.
      head_leaf: Flax path of the output projection, in models that have such a leaf.
      keeps_head_leaf: whether the Flax class has that leaf even where the config ties.
      other_tables: Flax paths of the input embedding in classes that have it elsewhere.
      same: (Flax path, PyTorch names) of other shared parameters: a head's bias.
      ignored: patterns of what PyTorch files hold besides parameters: masks, positions.
      prefix: what paths and names begin with in a model with a head, and not in one without.
      renamed: (pattern, replacement) of names in old files.
      hints: (pattern of paths, what to do where such a path is unmapped), or ().
    """

    lines: tuple[Line, ...]
    table: str
    shared: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("lm_head",)
    tied: bool = True
    head_leaf: str = "lm_head/kernel"
    keeps_head_leaf: bool = False
    other_tables: tuple[str, ...] = ()
    same: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    hints: tuple[str, ...] = ()
