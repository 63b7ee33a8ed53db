"""What a model's config says of its tie, in each release of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Decides = Literal["own", "text", "both", "either", "never", "always"]
TIED = "tie_word_embeddings"
# Where transformers 5 keeps what T5's `tie_word_embeddings` was: its classes scale the output of
# the decoder by it, and force the field itself to True.
SCALED = "scale_decoder_outputs"
# Types whose configs transformers 5 forces to True, and forgets what they were told.
FORCED = ("mt5", "udop", "vilt")
# Fields that hold the config of the part that reads and writes text, in a model of several parts.
_TEXT = ("text_config", "decoder", "generator")
# What ties in PyTorch's classes, by release and model_type, where it is neither the text part's
# flag in transformers 4 nor the whole model's in 5. tests/against_torch/ties_of_classes.py asks.
_OTHERWISE: dict[int, dict[str, Decides]] = {
    4: {
        "colpali": "either", "colqwen2": "never", "gptsan-japanese": "always", "lxmert": "always",
        "t5gemma": "either",
    },
    5: {
        **dict.fromkeys(
            ("EvollaModel", "bailing_hybrid", "esmc", "evolla", "inkling_mm_model", "inkling_text",
             "kimi_linear", "luke", "nemotron_h", "pop2piano", "qwen2_5_omni_talker", "xlstm"),
            "never",
        ),
        **dict.fromkeys(
            ("audioflamingo3", "cosmos3_edge", "muse_spark", "musicflamingo", "nemo_speechlm",
             "nemotron_h_omni", "omniasr", "qwen2_audio", "vibevoice_asr", "voxtral"),
            "both",
        ),
        **dict.fromkeys(
            ("blip-2", "encoder-decoder", "instructblip", "instructblipvideo", "kosmos-2.5",
             "llama4", "speech-encoder-decoder", "vision-encoder-decoder"),
            "text",
        ),
        "blip": "either", "kosmos-2": "either",
    },
}  # fmt: skip
# Types of transformers 5 that are True where the file says nothing.
_TRUE_UNSAID = ("nomic_bert",)


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
    own, release = config_field(config, TIED), _release(config)
    if not release or not (own is None or isinstance(own, bool)):
        return own
    kind = config_field(config, "model_type")
    parts = [config_field(config, name) for name in _TEXT]
    part = next((x for x in parts if config_field(x, "model_type")), None)
    text = config_field(part, TIED)
    if own is None:
        # transformers 4 leaves out what is its default, True; 5 what the class does not have.
        own = release == 4 or kind in _TRUE_UNSAID
    return _decided(
        _OTHERWISE[release].get(kind, "text" if release == 4 else "own"), own, text, part
    )


def _decided(by: Decides, own: Any, text: Any, part: Any) -> bool | None:
    if by in ("never", "always"):
        return by == "always"
    if by == "own" or part is None:
        return own
    if text is None and isinstance(part, Mapping):
        return None  # A file of transformers 4 leaves out the default of the part's own class.
    if by == "text":
        return own if text is None else text
    return bool(own and text) if by == "both" else bool(own or text)


def is_forced(config: Any) -> bool:
    """Returns whether a config says that it ties whatever it was told."""
    return (
        config_field(config, "model_type") in FORCED
        and config_field(config, TIED) is True
        and _release(config) >= 5
    )


def _release(config: Any) -> int:
    """Returns which of its releases a config of transformers is of, 4 or 5; 0 of another's."""
    if config_field(config, "model_type") is None:
        return 0
    to_dict = getattr(config, "to_dict", None)
    fields = to_dict() if callable(to_dict) and not isinstance(config, type) else config
    version = fields.get("transformers_version") if isinstance(fields, Mapping) else None
    first = str(version).partition(".")[0]
    return min(max(int(first), 4), 5) if first.isdigit() else 0
