"""The tables of names of Levanter's families: Haliax's arrays, outputs first, layers stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_tied_lora._names.decoder_lines import OUTPUTS_FIRST, Decoder
from flax_tied_lora._names.family import Family
from flax_tied_lora._names.line import make_line

_TABLE = "embeddings/token_embeddings/weight"


def _llama() -> Family:
    return Decoder(
        table=_TABLE,
        layers="transformer/layers/stacked",
        last_norm="transformer/norm",
        head="lm_head/weight",
        leaf="weight",
        scale="weight",
        layouts=OUTPUTS_FIRST,
        stacked=True,
    ).family(tied=False)


def _gpt2() -> Family:
    """Returns what is known of GPT-2, whose projections have their inputs first, as PyTorch's."""
    block, torch = "transformer/blocks/stacked", "transformer.h.{layer}"
    weights = {
        "attn/c_attn": "in qkv heads dim -> in (qkv heads dim)",
        "attn/c_proj": "heads dim out -> (heads dim) out",
        "mlp/c_fc": "in out -> in out",
        "mlp/c_proj": "in out -> in out",
    }
    biases = {"attn/c_attn": "qkv heads dim -> (qkv heads dim)"}
    lines: list[tuple[Any, ...]] = [
        (_TABLE, "transformer.wte.weight", "row column -> row column", "embedding"),
        ("embeddings/position_embeddings/weight", "transformer.wpe.weight",
         "row column -> row column", "embedding"),
    ]  # fmt: skip
    for module, layout in weights.items():
        name = f"{torch}.{module.replace('/', '.')}"
        lines.append(
            (f"{block}/{module}/weight", f"{name}.weight", f"{{layer}} {layout}", "conv1d")
        )
        bias = biases.get(module, "d -> d")
        lines.append((f"{block}/{module}/bias", f"{name}.bias", f"{{layer}} {bias}"))
    for leaf in ("weight", "bias"):
        for norm in ("ln_1", "ln_2"):
            lines.append((f"{block}/{norm}/{leaf}", f"{torch}.{norm}.{leaf}", "{layer} d -> d"))
        lines.append((f"transformer/ln_f/{leaf}", f"transformer.ln_f.{leaf}", "d -> d"))
    masks = r"(.*\.)?h\.\d+\.attn\.(masked_)?bias"
    return Family(tuple(map(make_line, lines)), _TABLE, ignored=(masks,))


FAMILIES: dict[str, Callable[[], Family]] = {"levanter/llama": _llama, "levanter/gpt2": _gpt2}


def levanter_family(config: Any) -> str | None:
    """Returns the family of a Levanter config, or None for any other object."""
    library, _, rest = type(config).__module__.partition(".models.")
    return f"levanter/{rest.partition('.')[0]}" if library == "levanter" else None
