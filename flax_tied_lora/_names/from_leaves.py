"""`names_of_leaves`: the table of names of a model whose leaves carry Hugging Face's own names."""

from __future__ import annotations

import re
from typing import Any

from flax_tied_lora._names.mapping import Names
from flax_tied_lora._names.model_config import config_field, says_tied
from flax_tied_lora._names.names_of import names_of
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import flatten, is_marker

# Modules whose weight is a table of rows, by the last part of their names.
_TABLES = ("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "shared")
_HEADS = ("lm_head", "embed_out")
# GPT-2's projections, which PyTorch stores as Flax does.
_CONV1D = {"gpt2": ("c_attn", "c_fc", "c_proj", "q_attn")}


def names_of_leaves(params: Any, model: Any = None, *, prefix: str = "") -> Names:
    """Returns the table of names of params whose modules are called as in PyTorch.

    ``model/layers/0/self_attn/q_proj/kernel`` is ``model.layers.0.self_attn.q_proj.weight``, and so
    is ``model/layers_0/...``. A leaf called ``kernel`` is [in, out], one called ``weight`` as
    PyTorch has it, ``embedding`` a table, and ``scale`` a norm's weight; any other keeps its name.

    Args:
      params: a pytree; its leaves' names and shapes are all that is read.
      model: the model's config, or the dict in its ``config.json``, which says whether input and
        output are tied, and how many tokens there are.
      prefix: what PyTorch's names begin with and the paths do not: ``"model."``.

    Returns:
      A table that a model of more or fewer layers has too.

    Raises:
      ValueError: a kernel has other than two axes, so that a line of its own has to say which is
        which (`names_of`); two leaves would be one parameter; a tied table is not there.

    >>> import jax
    >>> kernel = jax.ShapeDtypeStruct((4, 8), "float32")
    >>> names = names_of_leaves({"model": {"layers": {"0": {"up_proj": {"kernel": kernel}}}}})
    >>> names.to_torch("model/layers/3/up_proj/kernel", 2)[0].name
    'model.layers.3.up_proj.weight'
    """
    model_type = config_field(model, "model_type") or "own"
    lines: dict[str, tuple[Any, ...]] = {}
    table, head = None, False
    for path, leaf in flatten(params)[0].items():
        if is_marker(leaf):
            continue
        line = _line(path, len(unboxed(leaf).shape), prefix, model_type)
        lines[line[0]] = line
        module, _, last = path.rpartition("/")
        name = module.rpartition("/")[2]
        head = head or name in _HEADS
        if table is None and last in ("embedding", "weight") and name in _TABLES[:3]:
            table = path
    tied = None if model is None else says_tied(model)
    tied = not head if tied is None else bool(tied)
    if tied and table is None and model is not None:
        raise ValueError(
            f"names_of_leaves: the config says that input and output are tied, and no leaf is a "
            f"table called {', '.join(_TABLES[:3])}; give names_of the lines, and tied="
        )
    size = config_field(model, "vocab_size")
    return names_of(
        {"model_type": f"huggingface/{model_type}", "vocab_size": size},
        list(lines.values()),
        tied={table: ("lm_head",)} if tied and table is not None and not head else None,
    )


def _line(path: str, ndim: int, prefix: str, model_type: str) -> tuple[Any, ...]:
    """Returns the line of a leaf, with ``{}`` in place of numbers of layers."""
    *parts, last = path.split("/")
    pattern = "/".join([*map(_numbered, parts), last])
    module = prefix + ".".join(_numbered(re.sub(r"_(\d+)$", r".\1", part)) for part in parts)
    name = parts[-1] if parts else ""
    if last == "kernel":
        if ndim != 2:
            raise ValueError(
                f"names_of_leaves: {path!r} has {ndim} axes; expected [in, out]: give names_of a "
                "line with a layout for it"
            )
        if name in _CONV1D.get(model_type, ()):
            return pattern, f"{module}.weight", "in out -> in out", "conv1d"
        return pattern, f"{module}.weight", "in out -> out in", "linear"
    if last == "embedding":
        return pattern, f"{module}.weight", None, "embedding"
    parameter = "weight" if last == "scale" else last
    torch_name = f"{module}.{parameter}" if module else parameter
    if ndim == 1:
        return pattern, torch_name
    axes = " ".join(f"axis{i}" for i in range(ndim))
    layout = f"{axes} -> {axes}"
    if last == "weight" and ndim == 2:
        return pattern, torch_name, layout, "embedding" if name in _TABLES else "linear"
    return pattern, torch_name, layout


def _numbered(part: str) -> str:
    return re.sub(r"(^|(?<=[_.]))\d+$", "{}", part)
