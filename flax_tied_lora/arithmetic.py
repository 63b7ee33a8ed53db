"""Arithmetic on adapters: add them up, scale, switch and pad them, extract them from checkpoints.

`tied_lora.stack` is the sixth: many adapters, of different ranks too, over one base at once.
"""

from flax_tied_lora._arithmetic.combining import combine as combine
from flax_tied_lora._arithmetic.extraction import Extraction as Extraction
from flax_tied_lora._arithmetic.extraction import LeftOutWarning as LeftOutWarning
from flax_tied_lora._arithmetic.extraction import extract as extract
from flax_tied_lora._arithmetic.scaling import padded as padded
from flax_tied_lora._arithmetic.scaling import scale as scale
from flax_tied_lora._arithmetic.scaling import switch as switch

__all__ = [
    "Extraction",
    "LeftOutWarning",
    "combine",
    "extract",
    "padded",
    "scale",
    "switch",
]
