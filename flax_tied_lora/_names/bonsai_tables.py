"""The table of names of bonsai's Qwen 3, whose loader copies a tied table into the head's leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.decoder_lines import HEAD_NORMS, HEADS, Decoder
from flax_tied_lora._names.family import Family

FAMILIES: dict[str, Callable[[], Family]] = {
    "bonsai/qwen3": lambda: Decoder(
        table="embedder/embedding",
        layers="layers",
        last_norm="final_norm",
        head="lm_head/kernel",
        leaf="kernel",
        scale="scale",
        layouts=HEADS,
        attention="attn",
        head_norms=HEAD_NORMS,
    ).family(keeps_head_leaf=True),
}


def bonsai_family(config: Any) -> str | None:
    """Returns the family of a bonsai ``ModelConfig``, or None for any other object."""
    library, _, rest = type(config).__module__.partition(".models.")
    return f"bonsai/{rest.partition('.')[0]}" if library == "bonsai" else None
