"""What a model's config says of its tie, in each release of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIED = "tie_word_embeddings"
# Where transformers 5 keeps what T5's `tie_word_embeddings` was: its classes scale the output of
# the decoder by it, and force the field itself to True.
SCALED = "scale_decoder_outputs"
# Types whose configs transformers 5 forces to True, and forgets what they were told.
FORCED = ("mt5", "udop", "vilt")
# Fields of the config of the part that reads and writes text, in a model of several parts.
_TEXT = ("text_config", "decoder", "generator", "decoder_config")


def config_field(config: Any, name: str) -> Any:
    """Returns a field of a config, an object or a dict; None where it has none, or is a name."""
    if isinstance(config, str):
        return None
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def says_tied(config: Any) -> Any:
    """Returns whether a config ties input embedding and output projection.

    It is an object of transformers 4 or 5 or of another library, or a dict as in a config.json.

    Returns:
      True or False; None where it does not say; or what it has in place of these.
    """
    if config_field(config, SCALED) is False:
        return False
    own = config_field(config, TIED)
    if own is not None and not isinstance(own, bool):
        return own
    release = _release(config)
    # In transformers 4 the text part's config decides, in 5 that of the whole model.
    inner = [] if release >= 5 else [config_field(config, name) for name in _TEXT]
    said = [x for x in (config_field(part, TIED) for part in inner) if isinstance(x, bool)]
    if said:
        return said[0]
    if own is None and release and config_field(config, "model_type") is not None:
        # transformers 4 writes what is not the default, which is True; 5 what the class has.
        return release < 5
    return own


def is_forced(config: Any) -> bool:
    """Returns whether a config says that it ties whatever it was told."""
    return (
        config_field(config, "model_type") in FORCED
        and config_field(config, TIED) is True
        and _release(config) >= 5
    )


def _release(config: Any) -> int:
    """Returns the release of transformers that a config is of; 0 where it is of none."""
    to_dict = getattr(config, "to_dict", None)
    fields = to_dict() if callable(to_dict) and not isinstance(config, type) else config
    version = fields.get("transformers_version") if isinstance(fields, Mapping) else None
    first = str(version).partition(".")[0]
    return int(first) if first.isdigit() else 0
