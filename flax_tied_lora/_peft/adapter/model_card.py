"""The README of a saved adapter: what it is of, what it holds, and how it is loaded."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._peft.adapter.parameters import TorchAdapter
from flax_tied_lora._planning.plan import LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS

_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}  # fmt: skip


def model_card(config: Mapping[str, Any], adapters: Sequence[TorchAdapter]) -> str:
    """Returns the text: front matter as the Hugging Face Hub reads it, and Markdown.

    Args:
      config: as in ``adapter_config.json``.
      adapters: what is in the file.
    """
    base = config["base_model_name_or_path"]
    front = ["library_name: peft", "tags: [lora, flax, jax, flax_tied_lora]"]
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # a directory of one's own is no one else's
        front.insert(0, f"base_model: {base}")
    lora = [a for a in adapters if a.adapter.kind == LORA]
    ranks = sorted({a.adapter.rank for a in lora})
    rows = [
        ("base", f"`{base}`" if base else "not said (`base_model_name_or_path`)"),
        ("adapts", _listed(dict.fromkeys(m.rpartition(".")[2] for a in lora for m in a.modules))),
        ("rank", ", ".join(map(str, ranks)) or "none"),
        ("lora_alpha", f"{config['lora_alpha']}{', rsLoRA' if config['use_rslora'] else ''}"),
        ("tie", _tie(lora)),
        ("trained in full", _listed(_modules(adapters, MODULES_TO_SAVE))),
        ("trained tokens", _listed(_modules(adapters, TRAINABLE_TOKENS))),
        ("written by", f"flax_tied_lora {importlib.metadata.version('flax-tied-lora')}"),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return (
        "---\n" + "".join(f"{line}\n" for line in front) + "---\n\n# LoRA adapter\n\n"
        f"| | |\n|---|---|\n{table}\n{_loading(config)}"
    )


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def _modules(adapters: Sequence[TorchAdapter], kind: str) -> list[str]:
    return [m for a in adapters if a.adapter.kind == kind for m in a.modules]


def _tie(lora: Sequence[TorchAdapter]) -> str:
    shared = [a.modules for a in lora if len(a.modules) > 1 and not a.weights[0].part]
    if not shared:
        return "no adapted module shares its weight with another"
    return "; ".join(
        f"one delta for {' and '.join(f'`{m}`' for m in modules)}, in the file once for each"
        for modules in shared
    )


def _loading(config: Mapping[str, Any]) -> str:
    task = config["task_type"]
    base = json.dumps(config["base_model_name_or_path"] or "the base model")
    if task in _CLASSES:
        how = (
            f"from peft import {_CLASSES[task]}\n\nmodel = {_CLASSES[task]}.from_pretrained(HERE)\n"
        )
    else:
        how = "from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, HERE)\n"
    plain = config["lora_alpha"] == config["r"] and not config["rank_pattern"]
    served = "" if plain else (
        "Other servers may read less of it than PEFT: flax_tied_lora's page on serving elsewhere "
        "says which.\n"
    )  # fmt: skip
    return (
        "`HERE` stands for this directory. With PEFT:\n\n"
        f"```python\n{how}```\n\nWith vLLM:\n\n"
        f"```text\nvllm serve {base} --enable-lora --max-lora-rank {_max_rank(config)} "
        "--lora-modules adapter=HERE\n```\n\nWith flax_tied_lora, in JAX:\n\n"
        "```python\nfrom flax_tied_lora import peft\n\n"
        "adapted = peft.load_adapter(HERE, params, peft.names_of(model_config))\n```\n"
        f"\n{served}"
    ).rstrip() + "\n"


def _max_rank(config: Mapping[str, Any]) -> int:
    """Returns the least rank that vLLM has room for and that is enough."""
    rank = max([config["r"], *(config["rank_pattern"] or {}).values()])
    return next((room for room in (1, 8, 16, 32, 64, 128, 256, 320, 512) if room >= rank), rank)
