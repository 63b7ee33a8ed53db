"""LoRA for Flax models with tied weights: one delta wherever a shared matrix is read.

Its public modules (`nnx`, `peft`, `checkpoint` and the others) are loaded when they are first used.
"""

import importlib.metadata
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from flax_tied_lora._adapters import serialization as _serialization  # noqa: F401 (registers)
from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.dropout import NoDropoutWarning
from flax_tied_lora._adapters.split import combine, split
from flax_tied_lora._adapters.stack import adapter_axes, put, select, stack
from flax_tied_lora._algebra.site_filter import SiteFilter
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter import rules as _rules  # noqa: F401 (registers them)
from flax_tied_lora._interpreter.custom_rule import custom_rule
from flax_tied_lora._interpreter.materialised import DensifyError, DensifyWarning
from flax_tied_lora._interpreter.protocols import Operand, Rule, RuleContext
from flax_tied_lora._interpreter.registry import register_rule
from flax_tied_lora._interpreter.sites import CallSite, CallSites, Read
from flax_tied_lora._losses import rule as _loss_rule  # noqa: F401 (registers it)
from flax_tied_lora._planning.plan import AdapterPlan, GroupPlan, Plan
from flax_tied_lora._planning.targets import UnmatchedTargetWarning
from flax_tied_lora._planning.tying import WeightTyingWarning
from flax_tied_lora._ties.find import find_ties
from flax_tied_lora._ties.groups import Member, TieGroup
from flax_tied_lora._train.gradients import value_and_grad
from flax_tied_lora._tree.paths import TiedLeaf
from flax_tied_lora._tree.quantized_array import QuantizedArray
from flax_tied_lora._verbs.adapt import UnreadTargetWarning, adapt
from flax_tied_lora._verbs.adapted_model import AdaptedModel
from flax_tied_lora._verbs.explain import Explanation, NotTiedError, explain
from flax_tied_lora._verbs.frozen_gradient import FrozenGradientWarning
from flax_tied_lora._verbs.merge import base, merge
from flax_tied_lora._verbs.per_example import per_example
from flax_tied_lora._verbs.quantize import dequantize, quantize, stored_bytes
from flax_tied_lora._verbs.trace import trace
from flax_tied_lora._verbs.wrap import wrap
from flax_tied_lora._vocabulary.grow import Vocabulary, grow_vocabulary

if TYPE_CHECKING:
    from flax_tied_lora import arithmetic, checkpoint, losses, names, nnx, peft, serving, train

__version__ = importlib.metadata.version("flax-tied-lora")

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
    "Operand",
    "Plan",
    "QuantizedArray",
    "Read",
    "Rule",
    "RuleContext",
    "SiteFilter",
    "TieGroup",
    "TiedLeaf",
    "UnmatchedTargetWarning",
    "UnreadTargetWarning",
    "Vocabulary",
    "WeightTyingWarning",
    "adapt",
    "adapter_axes",
    "arithmetic",
    "base",
    "checkpoint",
    "combine",
    "custom_rule",
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


def __getattr__(name: str) -> ModuleType:
    """Returns a public module, which is run when something in it is first asked for."""
    spec = importlib.util.find_spec(f"{__name__}.{name}") if name in __all__ else None
    if spec is None or spec.loader is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Another thread may have been faster.
    globals()[name] = module = sys.modules.setdefault(spec.name, module)
    return module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
