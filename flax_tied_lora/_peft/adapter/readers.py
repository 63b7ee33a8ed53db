"""Programs that read adapters, and what each of them does with what a file may hold.

One table, from which come what `save_adapter` refuses and warns of, and a page of the docs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

Verdict = Literal["exact", "wrong", "dropped", "refused"]

# What a file may hold, and what to do where a reader does not serve it.
_PLAIN = "plain=True writes it as factors alone"
_MERGED = "save_merged writes a model"
FEATURES: Mapping[str, tuple[str, str]] = {
    "projections": ("factors of projections", _MERGED),
    "table": ("factors of an embedding or of the output projection", _MERGED),
    "use_rslora": ("use_rslora", _PLAIN),
    "alpha_pattern": ("alpha_pattern", _PLAIN),
    "rank_pattern": ("rank_pattern", _PLAIN),
    "regex": ("target_modules as a regex", _PLAIN),
    "partner": ("some of the modules that servers fuse", _PLAIN),
    "start": (
        "factors that started from the weight (init_lora_weights)",
        "save_adapter(directory, arithmetic.plain(adapted, params), names, plain=True) writes it "
        "as factors alone",
    ),
    "tokens": ("trained tokens (trainable_token_indices)", _PLAIN),
    "dora": ("use_dora", _MERGED),
    "copies": ("full copies (modules_to_save)", _MERGED),
    "biases": ("trained biases (bias)", _MERGED),
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a release of a program does with an adapter.

    Attributes:
      title: what people call it.
      release: the one that was looked at.
      seen: how: "run", or "read" where its source alone was.
      verdicts: by feature; one that is not here was not looked at.
      tables_of: model types whose tables it adapts; None for all.
      other_tables: what it does with those of others; None: it is not known.
      note: what else there is to know.
    """

    title: str
    release: str
    seen: Literal["run", "read"]
    verdicts: Mapping[str, Verdict]
    tables_of: tuple[str, ...] | None = None
    other_tables: Verdict | None = None
    note: str = ""

    def verdict(self, feature: str, family: str) -> Verdict | None:
        """Returns what becomes of a feature in a model of a family; None: it is not known."""
        if feature == "table" and self.tables_of is not None and family not in self.tables_of:
            return self.other_tables
        return self.verdicts.get(feature)


LOOKED_AT = "2026-11-30"
# By the name that `save_adapter(for_=...)` takes.
READERS: Mapping[str, Reader] = {
    "peft": Reader(
        "PEFT", "0.21.2", "run", dict.fromkeys(FEATURES, "exact"),
        note="with transformers 4.57 and 5.24, whose own `load_adapter` loads DoRA wrongly",
    ),
    "vllm": Reader(
        "vLLM", "0.32.0", "run",
        {"projections": "exact", "table": "exact", "use_rslora": "exact", "alpha_pattern": "exact",
         "rank_pattern": "exact", "regex": "exact", "partner": "exact", "start": "refused",
         "tokens": "refused", "dora": "refused", "copies": "refused"},
        tables_of=("llama", "mistral", "qwen3", "granite"), other_tables="refused",
        note="up to 0.30 it ignores both patterns; of Qwen 2, Gemma and OPT it adapts no table",
    ),
    "sglang": Reader(
        "SGLang", "0.5.23", "run",
        {"projections": "exact", "table": "exact", "use_rslora": "wrong", "alpha_pattern": "wrong",
         "rank_pattern": "refused", "regex": "refused", "partner": "refused", "start": "wrong",
         "tokens": "dropped", "dora": "dropped", "copies": "dropped"},
        tables_of=("llama",),
        note="its loader was run, its kernels were not; Gemma's table stops it (read)",
    ),
    "llama.cpp": Reader(
        "llama.cpp", "llama-cpp-python 0.3.36", "run",
        {"projections": "exact", "table": "refused", "use_rslora": "wrong",
         "alpha_pattern": "wrong", "rank_pattern": "exact", "regex": "exact",
         "partner": "exact", "start": "wrong", "tokens": "refused", "dora": "dropped",
         "copies": "dropped"},
        note="a merged model is exact",
    ),
    "mlx": Reader(
        "MLX-LM", "0.32", "read", dict.fromkeys(FEATURES, "refused"),
        note="wants files of its own form",
    ),
    "tensorrt-llm": Reader(
        "TensorRT-LLM", "of 2026-11", "read",
        {"projections": "exact", "table": "dropped", "alpha_pattern": "wrong"},
    ),
}  # fmt: skip
# Those that are warned of where no reader is named.
_WELL_KNOWN = ("vllm", "sglang", "llama.cpp")


def problems(
    features: Iterable[str], family: str, readers: Collection[str], silent: bool
) -> list[str]:
    """Returns what readers do not serve as it was trained, and what to do instead.

    Args:
      features: of the file.
      family: of the model.
      readers: their names.
      silent: whether only what a reader serves wrongly, without a word, counts.
    """
    found: dict[str, list[str]] = {}
    for feature in features:
        for name in readers:
            reader = READERS[name]
            verdict = reader.verdict(feature, family)
            if verdict == "exact" or (silent and verdict not in ("wrong", "dropped")):
                continue
            what = {
                "wrong": "serves it wrongly", "dropped": "drops it", "refused": "refuses it",
                None: "was not looked at with it",
            }[verdict]  # fmt: skip
            found.setdefault(feature, []).append(f"{reader.title} {reader.release} {what}")
    return [
        f"{FEATURES[feature][0]}: {', '.join(who)}; {FEATURES[feature][1]}"
        for feature, who in found.items()
    ]


def silently_wrong(features: Iterable[str], family: str) -> list[str]:
    """Returns what a well-known reader would serve wrongly without a word."""
    return problems(features, family, _WELL_KNOWN, silent=True)


def page() -> str:
    """Returns the table of docs/serving-elsewhere.md."""
    columns = list(READERS.values())
    words: dict[str | None, str] = {
        None: "not known", "exact": "yes", "wrong": "**wrongly**", "dropped": "**drops it**",
    }  # fmt: skip
    lines = [
        "| | " + " | ".join(r.title for r in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
        "| release | " + " | ".join(r.release for r in columns) + " |",
        "| looked at | " + " | ".join(f"{r.seen}, {LOOKED_AT}" for r in columns) + " |",
    ]
    for feature, (text, _) in FEATURES.items():
        cells = []
        for reader in columns:
            verdict = reader.verdicts.get(feature)
            cell = words.get(verdict, str(verdict))
            if feature == "table" and reader.tables_of is not None:
                cell += f" ({', '.join(reader.tables_of)})"
            cells.append(cell)
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    lines.append("| | " + " | ".join(r.note for r in columns) + " |")
    return "\n".join(lines) + "\n"
