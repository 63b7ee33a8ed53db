"""`quantize` for an `nnx.Module`, plain or adapted."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from flax import nnx

from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._nnx.checks import check_module
from flax_tied_lora._nnx.leaves import params_of, set_leaves
from flax_tied_lora._nnx.module import AdaptedModule
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs.quantize import QType
from flax_tied_lora._verbs.quantize import quantize as _quantize

_Module = TypeVar("_Module", bound=nnx.Module)


def quantize(
    module: _Module, qtype: QType = "int8", *, block_size: int = 64,
    exclude_modules: str | Collection[str] | None = None, sites: CallSites | None = None,
) -> _Module:  # fmt: skip
    """Returns a module whose matrices are stored quantised: one to be wrapped, or an adapted one.

    The matrices are `nnx.Param` Variables; adapters and all other state stay as they are. A plain
    module with quantised matrices has to be wrapped before it is called. The module that is given
    is left as it is; `base` and `merge` of the result return a floating-point one.

    Args:
      module: an `nnx.Module`, or an adapted one.
      qtype, block_size, exclude_modules: as in `tied_lora.quantize`.
      sites: from `trace`, as in `tied_lora.quantize`.

    Raises:
      TypeError: not an `nnx.Module`.
      ImportError, ValueError: as `tied_lora.quantize`.

    Example::

      adapted = tied_lora.nnx.wrap(tied_lora.nnx.quantize(model, "nf4"), config)
    """
    result = nnx.clone(module) if isinstance(module, nnx.Module) else module
    frozen = result.module if isinstance(result, AdaptedModule) else result
    check_module("quantize", frozen)
    stored = _quantize(
        params_of(frozen), qtype, block_size=block_size, exclude_modules=exclude_modules,
        sites=sites,
    )  # fmt: skip
    set_leaves("quantize", frozen, flatten(stored)[0])
    return result
