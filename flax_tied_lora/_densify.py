"""What is said where a weight is added up."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from flax_tied_lora._reasons import QUANTIZED, reason_for
from flax_tied_lora._sites import DENSE, DEQUANTISED, Read


class DensifyWarning(UserWarning):
    """A weight and its delta were added up into one array, at the cost of that array."""


class DensifyError(ValueError):
    """The same, refused: ``on_dense="error"``."""


def densified(read: Read) -> str:
    """Returns the message for a call site that had its weight added up."""
    site = read.site
    where = f" in {site.scope!r}" if site.scope else ""
    what = "is handed back" if site.operation == "return" else f"is read by {site.operation!r}"
    if read.served == DEQUANTISED:
        return (
            f"adapt: {site.leaf!r}, which is stored quantised, {what}{where}, {QUANTIZED}; it was "
            f"dequantised into one array of {read.bytes:,} bytes. Leave it out of what is "
            "quantised (exclude_modules), write a rule (register_rule), or accept the cost with "
            'on_dense="allow"'
        )
    return (
        f"adapt: {site.leaf!r} {what}{where}, {reason_for(site.operation)}; the weight and its "
        f"delta were added up into one array of {read.bytes:,} bytes. Take it out of "
        'target_modules, write a rule (register_rule), or accept the cost with on_dense="allow"'
    )


def warn_of_dense(reads: Sequence[Read], stacklevel: int = 3) -> None:
    """Warns once for each call site that had its weight added up."""
    for read in dict.fromkeys(r for r in reads if r.served in (DENSE, DEQUANTISED)):
        warnings.warn(densified(read), DensifyWarning, stacklevel=stacklevel)
