"""The ``config.json`` of a merged model: the given config, checked against the tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_tied_lora._names.model_config import SCALED, TIED
from flax_tied_lora._peft.files.errors import shown

# The fields in which configs have the width of the input embedding; the first present one counts.
_WIDTHS = ("word_embed_proj_dim", "embedding_size", "hidden_size", "n_embd", "d_model")
# T5's family scales the logits of a tied head only. Its lookups always are one module.
T5_LIKE = (
    "t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano", "udop",
)  # fmt: skip
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")


def plain_config(config: Any) -> dict[str, Any]:
    """Returns a transformers config, an object or a dict, as a new dict.

    Raises:
      TypeError: it is neither.
      ValueError: it is not the config of a PyTorch model that the tensors could be for.
    """
    if isinstance(config, Mapping):
        fields = dict(config)
    elif callable(getattr(config, "to_dict", None)) and not isinstance(config, type):
        fields = dict(config.to_dict())
    else:
        raise TypeError(
            f"save_merged: config is a {type(config).__name__}; expected the transformers config "
            "of the PyTorch model, or a dict as in its config.json"
        )
    kind = fields.get("model_type")
    if not isinstance(kind, str) or not kind or "/" in kind:
        raise ValueError(
            f"save_merged: the config's model_type is {kind!r}; expected transformers' name of the "
            "PyTorch model, such as 'llama' or 'qwen3', by which it finds the class"
        )
    tied = fields.get(TIED)
    if not (tied is None or isinstance(tied, bool)):
        raise ValueError(f"save_merged: the config's {TIED} is {tied!r}; expected True or False")
    if isinstance(fields.get("text_config"), Mapping):
        raise ValueError(
            "save_merged: the config has a text_config, so its model is more than the text model "
            "that the names are of; give config.text_config"
        )
    if fields.get("quantization_config"):
        raise ValueError(
            "save_merged: the config has a quantization_config, and merged tensors are not "
            "quantised; leave it out of the config"
        )
    return fields


def check_sizes(fields: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> None:
    """Checks that a config has the vocabulary size and the width of the input embedding.

    PyTorch would refuse the file otherwise, or initialise the table at random.

    Args:
      fields: the config.
      name, shape: of the input embedding.
    """
    width = next((n for n in _WIDTHS if fields.get(n) is not None), None)
    for field, size in (("vocab_size", shape[0]), (width, shape[1])):
        value = fields.get(field) if field else None
        if value is not None and value != size:
            raise ValueError(
                f"save_merged: the config's {field} is {value!r}, and {name} is {list(shape)}; "
                f"expected {field}={size}: give the config of this model"
            )


def settled_tie(
    fields: Mapping[str, Any], tied: bool, table: str, heads: Iterable[str], untie: bool
) -> bool | None:
    """Returns what ``tie_word_embeddings`` has to be in the written config; None to leave it out.

    Args:
      fields: the config as it was given.
      tied: whether the names say that an output projection shares the table.
      table: name of the table.
      heads: output projections that are separate tensors.
      untie: whether the output projection is to be untied.

    Raises:
      ValueError: config and names contradict each other.
    """
    says, heads = fields.get(TIED), list(heads)
    if fields.get(SCALED) is False:  # transformers 5 forces the other to True
        says = False
    kind, architectures = fields["model_type"], list(fields.get("architectures") or [])
    if untie:
        if kind in T5_LIKE:
            raise ValueError(
                f"save_merged: untie for model_type {kind!r}, whose PyTorch model scales its "
                "logits where it is tied, and only there, so that an untied copy would be another "
                "model; train one adapter for the tie (ensure_weight_tying=None)"
            )
        return False
    if tied and says is False:
        raise ValueError(
            f"save_merged: the config says {TIED}=False, and the names say that the output "
            f"projection is {table}, which is stored once: PyTorch would make a random one. Give "
            "the tied model's config; or, if it is not tied, names_of(..., "
            "tie_word_embeddings=False)"
        )
    if heads and says is True:
        raise ValueError(
            f"save_merged: the config says {TIED}=True, and the names have {heads[0]} as a tensor "
            f"beside {table}: PyTorch would drop it. If it is tied, names_of(config) says so; if "
            f"it is not, give a config with {TIED}=False"
        )
    if says is False and not heads and any(str(a).endswith(_WITH_HEAD) for a in architectures):
        raise ValueError(
            f"save_merged: the config says {TIED}=False, and no leaf is the output projection of "
            f"{architectures[0]}: PyTorch would make a random one. Give the config and names_of "
            "the tied model, or params with the leaf"
        )
    if tied:
        return True
    return False if heads else says


def config_text(fields: dict[str, Any], tied: bool | None, dtypes: Iterable[np.dtype]) -> str:
    """Returns the text of ``config.json``.

    Args:
      fields: the config as it was given.
      tied: ``tie_word_embeddings``; None leaves the field as it is.
      dtypes: of the tensors.
    """
    fields = dict(fields)
    if tied is not None:
        fields[TIED] = tied
    floats = {d for d in dtypes if jnp.issubdtype(d, jnp.floating)}
    if floats:
        bits = max(d.itemsize for d in floats)
        widest = [str(d) for d in floats if d.itemsize == bits]
        # Neither float16 nor bfloat16 holds all values of the other.
        name = widest[0] if len(widest) == 1 else "float32"
        # Releases before 4.56 read only the second name, so a config that has it keeps it.
        present = [key for key in ("dtype", "torch_dtype") if key in fields]
        fields |= dict.fromkeys(present or ["dtype"], name)
    names = fields.get("architectures")
    if isinstance(names, list | tuple):
        fields["architectures"] = [str(name).removeprefix("Flax") for name in names]
    for name, value in fields.items():
        try:
            json.dumps({name: value})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"save_merged: the config's {name} is {shown(value)}, which JSON cannot hold "
                f"({error}); give the config's to_dict()"
            ) from error
    ordered = {name: fields[name] for name in sorted(fields, key=str)}
    return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"
