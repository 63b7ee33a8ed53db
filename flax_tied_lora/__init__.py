"""LoRA for Flax models with tied weights: one delta wherever a shared matrix is read."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from flax_tied_lora import losses as losses
from flax_tied_lora import serving as serving
from flax_tied_lora import train as train
from flax_tied_lora._adapters.adapted import Adapted as Adapted
from flax_tied_lora._adapters.dropout import NoDropoutWarning as NoDropoutWarning
from flax_tied_lora._adapters.split import combine as combine
from flax_tied_lora._adapters.split import split as split
from flax_tied_lora._algebra.site_filter import SiteFilter as SiteFilter
from flax_tied_lora._config.config import LoraConfig as LoraConfig
from flax_tied_lora._interpreter import rules as _rules  # noqa: F401 (registers them)
from flax_tied_lora._interpreter.materialised import DensifyError as DensifyError
from flax_tied_lora._interpreter.materialised import DensifyWarning as DensifyWarning
from flax_tied_lora._interpreter.registry import register_rule as register_rule
from flax_tied_lora._interpreter.sites import CallSite as CallSite
from flax_tied_lora._interpreter.sites import CallSites as CallSites
from flax_tied_lora._interpreter.sites import Read as Read
from flax_tied_lora._losses import rule as _loss_rule  # noqa: F401 (registers it)
from flax_tied_lora._planning.plan import AdapterPlan as AdapterPlan
from flax_tied_lora._planning.plan import GroupPlan as GroupPlan
from flax_tied_lora._planning.plan import Plan as Plan
from flax_tied_lora._planning.targets import UnmatchedTargetWarning as UnmatchedTargetWarning
from flax_tied_lora._planning.tying import WeightTyingWarning as WeightTyingWarning
from flax_tied_lora._ties.find import find_ties as find_ties
from flax_tied_lora._ties.sources import Member as Member
from flax_tied_lora._ties.sources import TieGroup as TieGroup
from flax_tied_lora._tree.paths import TiedLeaf as TiedLeaf
from flax_tied_lora._tree.quantized_array import QuantizedArray as QuantizedArray
from flax_tied_lora._verbs.adapt import UnreadTargetWarning as UnreadTargetWarning
from flax_tied_lora._verbs.adapt import adapt as adapt
from flax_tied_lora._verbs.adapted_model import AdaptedModel as AdaptedModel
from flax_tied_lora._verbs.explain import Explanation as Explanation
from flax_tied_lora._verbs.explain import NotTiedError as NotTiedError
from flax_tied_lora._verbs.explain import explain as explain
from flax_tied_lora._verbs.frozen_gradient import FrozenGradientWarning as FrozenGradientWarning
from flax_tied_lora._verbs.merge import base as base
from flax_tied_lora._verbs.merge import merge as merge
from flax_tied_lora._verbs.quantize import dequantize as dequantize
from flax_tied_lora._verbs.quantize import quantize as quantize
from flax_tied_lora._verbs.quantize import stored_bytes as stored_bytes
from flax_tied_lora._verbs.trace import trace as trace
from flax_tied_lora._verbs.wrap import wrap as wrap
from flax_tied_lora._vocabulary.grow import Vocabulary as Vocabulary
from flax_tied_lora._vocabulary.grow import grow_vocabulary as grow_vocabulary
from flax_tied_lora.serving import adapter_axes as adapter_axes
from flax_tied_lora.serving import per_example as per_example
from flax_tied_lora.serving import put as put
from flax_tied_lora.serving import select as select
from flax_tied_lora.serving import stack as stack
from flax_tied_lora.train import value_and_grad as value_and_grad

if TYPE_CHECKING:
    from flax_tied_lora import arithmetic as arithmetic
    from flax_tied_lora import checkpoint as checkpoint
    from flax_tied_lora import names as names
    from flax_tied_lora import nnx as nnx
    from flax_tied_lora import peft as peft

__version__ = importlib.metadata.version("flax-tied-lora")

# Loaded when they are first asked for: each imports a library that not everybody needs.
_ON_FIRST_USE = ("arithmetic", "checkpoint", "names", "nnx", "peft")

__all__ = [
    "Adapted",
    "AdaptedModel",
    "AdapterPlan",
    "CallSite",
    "CallSites",
    "DensifyError",
    "DensifyWarning",
    "Explanation",
    "FrozenGradientWarning",
    "GroupPlan",
    "LoraConfig",
    "Member",
    "NoDropoutWarning",
    "NotTiedError",
    "Plan",
    "QuantizedArray",
    "Read",
    "SiteFilter",
    "TieGroup",
    "TiedLeaf",
    "UnmatchedTargetWarning",
    "UnreadTargetWarning",
    "Vocabulary",
    "WeightTyingWarning",
    "__version__",
    "adapt",
    "adapter_axes",
    "arithmetic",
    "base",
    "checkpoint",
    "combine",
    "dequantize",
    "explain",
    "find_ties",
    "grow_vocabulary",
    "losses",
    "merge",
    "names",
    "nnx",
    "peft",
    "per_example",
    "put",
    "quantize",
    "register_rule",
    "select",
    "serving",
    "split",
    "stack",
    "stored_bytes",
    "trace",
    "train",
    "value_and_grad",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
