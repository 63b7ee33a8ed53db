"""Arithmetic on adapters: combine, scale, switch and pad them, extract them from checkpoints.

`combine` is a weighted sum of adapters as one adapter. `scale` multiplies adapters by a number,
`switch` replaces those of an `Adapted` by others, and `padded` gives them a larger rank. `plain`
says the same function in factors alone. `extract` makes adapters of the difference between two
checkpoints. To serve many adapters over one base at once, see `flax_tied_lora.serving`.
"""

from flax_tied_lora._adapters.plain_factors import plain as plain
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
    "plain",
    "scale",
    "switch",
]
