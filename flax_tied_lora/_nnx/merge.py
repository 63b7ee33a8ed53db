"""Plain modules from an adapted one; a module quantised."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from flax import nnx
from jax.typing import DTypeLike

from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._nnx.checks import check_adapted_module, check_module
from flax_tied_lora._nnx.leaves import params_of, set_leaves
from flax_tied_lora._nnx.module import Adaptable, AdaptedModule, as_adapted
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs import merge as _merge
from flax_tied_lora._verbs import quantize as _quantize
from flax_tied_lora._verbs.quantize import QType

_Module = TypeVar("_Module", bound=nnx.Module)


def merge(
    module: AdaptedModule[Adaptable],
    *,
    dtype: DTypeLike | None = None,
    untie: Mapping[str, str] | None = None,
) -> Adaptable:
    """Returns the plain module with each delta added to its weight once, and the ties intact.

    Args:
      module: what to merge. It stays as it is.
      dtype, untie: as in `tied_lora.merge`; a leaf that is untied has to be a Variable already.

    Raises:
      TypeError, ValueError: as `tied_lora.merge`; or ``untie`` names no Variable of its own.
    """
    check_adapted_module("merge", module)
    leaves, _ = flatten(_merge.merge(as_adapted(module), dtype=dtype, untie=untie))
    plain = nnx.clone(module.module)
    set_leaves("merge", plain, leaves)
    return plain


def base(module: AdaptedModule[Adaptable]) -> Adaptable:
    """Returns the plain module without the adapters, for example for a reference model.

    Its Variables are its own, their arrays are shared.

    Raises:
      TypeError: not an adapted module.
      ValueError: the adapters' first values were taken out of the params (PiSSA, OLoRA).
    """
    check_adapted_module("base", module)
    leaves, _ = flatten(_merge.base(as_adapted(module)))
    plain = nnx.clone(module.module)
    set_leaves("base", plain, leaves)
    return plain


def quantize(
    module: _Module, qtype: QType = "int8", *, block_size: int = 64,
    exclude_modules: str | Collection[str] | None = None, sites: CallSites | None = None,
) -> _Module:  # fmt: skip
    """Returns a module whose matrices are stored quantised, to be wrapped; or an adapted one's.

    Quantised are `nnx.Param` Variables; adapters and all other state stay as they are. A module
    runs on them once it is wrapped, and not before. The module is left as it is, and `base` and
    `merge` return a floating-point one.

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
    made = nnx.clone(module) if isinstance(module, nnx.Module) else module
    frozen = made.module if isinstance(made, AdaptedModule) else made
    check_module("quantize", frozen)
    stored = _quantize.quantize(
        params_of(frozen), qtype, block_size=block_size, exclude_modules=exclude_modules,
        sites=sites,
    )  # fmt: skip
    set_leaves("quantize", frozen, flatten(stored)[0])
    return made
