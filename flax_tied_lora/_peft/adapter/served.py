"""What of a saved adapter other programs do not serve as it was trained: refused, or warned of."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax_tied_lora._config.checks import as_tuple
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.parameters import TorchAdapter
from flax_tied_lora._peft.adapter.readers import READERS, problems, silently_wrong
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._planning.plan import BIAS, LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS


class ServingWarning(UserWarning):
    """A well-known server would serve a saved adapter otherwise than it was trained."""


def checked_readers(for_: Any) -> tuple[str, ...]:
    """Returns the readers that an adapter is saved for.

    Raises:
      ValueError: one of them is unknown.
    """
    names = as_tuple(for_)
    for name in names:
        if name not in READERS:
            raise ValueError(
                f"save_adapter: for_={name!r}; expected of {', '.join(map(repr, READERS))}"
            )
    return names


def check_served(
    readers: Sequence[str], adapters: Sequence[TorchAdapter], config: Mapping[str, Any],
    partners: Collection[str], names: Names,
) -> None:  # fmt: skip
    """Refuses what the named readers do not serve; warns where none is named.

    Args:
      partners: modules that servers fuse with adapted ones, and that have no factors.

    Raises:
      AdapterFileError: a reader serves something in the file wrongly, or not at all.
    """
    features = _features(adapters, config, partners, names)
    family = names.family.rpartition("/")[2]
    if not readers:
        for problem in silently_wrong(features, family):
            warnings.warn(
                f"save_adapter: {problem}. for_='peft', or another reader's name, says for whom it "
                "is",
                ServingWarning,
                stacklevel=3,
            )
        return
    found = problems(features, family, readers, silent=False)
    if found:
        raise AdapterFileError(f"save_adapter: for_={list(readers)}: {'; and '.join(found)}")


def _features(
    adapters: Sequence[TorchAdapter], config: Mapping[str, Any], partners: Collection[str],
    names: Names,
) -> list[str]:  # fmt: skip
    """Returns what a file holds, in the order of the readers' table."""
    kinds = {a.adapter.kind for a in adapters}
    heads = {"lm_head", *(head for tied in names.tied.values() for head in tied)}
    lora = [a for a in adapters if a.adapter.kind == LORA]
    tables = [
        a for a in lora
        if any(w.kind == "embedding" or w.module in heads for w in a.weights)
    ]  # fmt: skip
    targets = config["target_modules"]
    held = {
        "projections": len(lora) > len(tables),
        "table": bool(tables),
        "use_rslora": config["use_rslora"] and bool(lora),
        "alpha_pattern": bool(config["alpha_pattern"]),
        "rank_pattern": bool(config["rank_pattern"]),
        "regex": isinstance(targets, str) and targets.lower() != "all-linear",
        "partner": bool(partners),
        "start": any(a.adapter.residual for a in lora),
        "tokens": TRAINABLE_TOKENS in kinds,
        "dora": any(a.adapter.dora for a in lora),
        "copies": MODULES_TO_SAVE in kinds,
        "biases": BIAS in kinds,
    }
    return [feature for feature, there in held.items() if there]
