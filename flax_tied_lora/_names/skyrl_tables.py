"""The tables of names of SkyRL tx's families: Hugging Face's modules, layers stacked or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.decoder_lines import FLAT, HEAD_NORMS, Decoder
from flax_tied_lora._names.family import Family
from flax_tied_lora._names.model_config import config_field


def _family(*, stacked: bool, **fields: Any) -> Family:
    return Decoder(
        table="model/embed_tokens/embedding",
        layers="model/layers/_stacked" if stacked else "model/layers",
        last_norm="model/norm",
        head="lm_head/kernel",
        leaf="kernel",
        scale="weight",
        layouts=FLAT,
        stacked=stacked,
        **fields,
    ).family(tied=False)


# Since skyrl 0.4 layers are stacked, and Qwen 3's projections fused, of which there is no table.
FAMILIES: dict[str, Callable[[], Family]] = {
    "skyrl-tx/llama": lambda: _family(stacked=False),
    "skyrl-tx/qwen3": lambda: _family(stacked=False, head_norms=HEAD_NORMS),
    "skyrl/llama": lambda: _family(stacked=True),
}


def skyrl_family(config: Any) -> str | None:
    """Returns the family of a ``ModelConfig`` of SkyRL tx, or None for any other object."""
    library, _, rest = type(config).__module__.partition(".models.")
    known = {"tx": "skyrl-tx", "skyrl.tx": "skyrl"}
    if library not in known or rest != "configs":
        return None
    return f"{known[library]}/{config_field(config, 'model_type')}"
