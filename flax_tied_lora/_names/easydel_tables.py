"""The tables of names of EasyDeL's families: Hugging Face's modules, whose leaves are kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.decoder_lines import FLAT, GEMMA_NORMS, HEAD_NORMS, Decoder
from flax_tied_lora._names.family import Family
from flax_tied_lora._names.model_config import config_field


def _family(*, tied: bool, **fields: Any) -> Family:
    return Decoder(
        table="model/embed_tokens/embedding",
        layers="model/layers",
        last_norm="model/norm",
        head="lm_head/kernel",
        leaf="kernel",
        scale="kernel",
        layouts=FLAT,
        **fields,
    ).family(tied=tied)


FAMILIES: dict[str, Callable[[], Family]] = {
    "easydel/llama": lambda: _family(tied=False),
    "easydel/qwen3": lambda: _family(tied=False, head_norms=HEAD_NORMS),
    "easydel/gemma3": lambda: _family(tied=True, norms=GEMMA_NORMS, head_norms=HEAD_NORMS),
}


def easydel_family(config: Any) -> str | None:
    """Returns the family of an EasyDeL config, or None for any other object.

    Its configs are transformers' by their ``model_type``, and its leaves are not.
    """
    if type(config).__module__.partition(".")[0] != "easydel":
        return None
    return f"easydel/{str(config_field(config, 'model_type')).removesuffix('_text')}"
