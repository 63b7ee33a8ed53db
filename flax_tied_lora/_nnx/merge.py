"""`merge` and `base`: plain modules from an adapted one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from flax_tied_lora._nnx.checks import check_adapted_module
from flax_tied_lora._nnx.leaves import set_leaves
from flax_tied_lora._nnx.module import Adaptable, AdaptedModule, as_adapted
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs import merge as _merge


def merge(
    module: AdaptedModule[Adaptable],
    *,
    dtype: DTypeLike | None = None,
    untie: Mapping[str, str] | None = None,
) -> Adaptable:
    """Returns the plain module with each delta added to its weight once, and the ties intact.

    Args:
      module: what to merge; it is left as it is.
      dtype, untie: as in `tied_lora.merge`; ``untie`` names Variables that the module has already.

    Raises:
      TypeError, ValueError: as `tied_lora.merge`; or ``untie`` names no separate Variable.
    """
    check_adapted_module("merge", module)
    return _plain("merge", module, _merge.merge(as_adapted(module), dtype=dtype, untie=untie))


def base(module: AdaptedModule[Adaptable]) -> Adaptable:
    """Returns the plain module without the adapters, for example for a reference model.

    It has new Variables, which share the arrays of the adapted module's.

    Raises:
      TypeError: not an adapted module.
      ValueError: the adapters' initial values were subtracted from the params (PiSSA, OLoRA).
    """
    check_adapted_module("base", module)
    return _plain("base", module, _merge.base(as_adapted(module)))


def _plain(what: str, module: AdaptedModule, params: Any) -> Any:
    """Returns a clone of the module that is adapted, with other params."""
    plain = nnx.clone(module.module)
    set_leaves(what, plain, flatten(params)[0])
    return plain
