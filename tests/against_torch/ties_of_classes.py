"""Writes what each PyTorch class of transformers does with its config's tie, on the meta device.

Run with each release in turn, where PyTorch is installed; the table of the other stays:

    python tests/against_torch/ties_of_classes.py tests/names/ties_of_classes.json
"""

from __future__ import annotations

import copy
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

WITH_HEADS = [
    getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING")
    for name in (
        "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM",
        "MASKED_LM", "PRETRAINING",
    )
]  # fmt: skip
# What makes a model deep, and so slow to build: ties are the same in a shallow one.
DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers", "depth",
)  # fmt: skip
SECONDS = 60
TIED, SCALED = "tie_word_embeddings", "scale_decoder_outputs"


def shallow(config: Any) -> None:
    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int) and getattr(config, name) > 2:
            setattr(config, name, 2)
    for name, value in list(vars(config).items()):
        if name in ("layer_types", "layers_block_type", "mlp_layer_types") and value:
            setattr(config, name, list(value)[:2])
        if isinstance(value, transformers.PretrainedConfig):
            shallow(value)


def built(classes: list[Any], make: Any) -> Any:
    """Returns the first model with an output projection that its config can be built into."""
    for cls in classes:
        for shrink in (shallow, lambda config: None):
            config = make()
            shrink(config)
            signal.alarm(SECONDS)
            try:
                with torch.device("meta"):
                    model = cls(config)
                model.tie_weights()
                table = model.get_input_embeddings().weight
            except Exception:  # another class, or another depth
                continue
            finally:
                signal.alarm(0)
            weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
            heads = [weight for weight in weights if weight.shape == table.shape]
            tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
            if heads:
                return cls.__name__, bool({*map(id, heads)} & {*map(id, [table, *tables])})
            break
    return None


def text_part(config: Any) -> str | None:
    """Returns the field that holds the config of a model's decoder of text, if one does."""
    text = config.get_text_config(decoder=True)
    return next((name for name, value in vars(config).items() if value is text), None)


def flags(config: Any, part: str | None, tied: bool) -> str:
    """Returns what an object says, what its config.json, and what its class does: T, F or -.

    Each says, in this order, of itself, of its part for text, and of the scale of its decoder.
    """
    written = config.to_diff_dict()
    inner = written.get(part) or {}
    said = [getattr(config, TIED, None), getattr(getattr(config, part or "", None), TIED, None)]
    said += [getattr(config, SCALED, None)]
    said += [written.get(TIED), inner.get(TIED), written.get(SCALED), tied]
    return "".join({True: "T", False: "F"}.get(x, "-") for x in said)


def row(name: str) -> list[Any] | None:
    """Returns what a model's configs say and its class does: as it is, told True, told False."""
    kind = transformers.CONFIG_MAPPING[name]
    classes: list[Any] = []
    for mapping in WITH_HEADS:
        found = mapping.get(kind, None)
        found = found if isinstance(found, tuple) else (found,)
        classes += [cls for cls in found if cls is not None and cls not in classes]
    for end in ("ForMaskedLM", "ForConditionalGeneration", "ForCausalLM"):
        own = getattr(transformers, kind.__name__.removesuffix("Config") + end, None)
        classes += [own] if own and own not in classes else []
    part = text_part(kind()) if classes else None
    told: list[dict[str, Any]] = [{}, {TIED: True}, {TIED: False}]
    told += [{part: {TIED: tied}} for tied in (True, False) if part]
    rows = []
    for fields in told:
        outcome = built(classes, lambda fields=fields: kind(**copy.deepcopy(fields)))
        if outcome is None and not fields:
            return None
        if outcome:
            rows.append(flags(kind(**copy.deepcopy(fields)), part, outcome[1]))
            cls = outcome[0]
    return [cls, part, *dict.fromkeys(rows)]


def as_text(table: dict[str, dict[str, Any]]) -> str:
    """Returns the table as JSON with a line for each type."""
    releases = []
    for release, rows in sorted(table.items()):
        lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(rows.items())]
        releases.append(f"{json.dumps(release)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{" + ",\n".join(releases) + "}\n"


def main(path: Path, names: list[str]) -> None:
    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    table = json.loads(path.read_text()) if path.exists() else {}
    rows = {}
    for name in names or sorted(transformers.CONFIG_MAPPING.keys()):
        try:
            found = row(name)
        except Exception:
            found = None
        print(name, json.dumps(found), flush=True)  # noqa: T201
        if found:
            rows[name] = found
    table.setdefault(transformers.__version__, {}).update(rows)
    path.write_text(as_text(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
