"""LoRA for `nnx.Module`: wrapped, called and trained as NNX has it.

`wrap` returns an `nnx.Module` that is called like the module was; its factors are `nnx.LoRAParam`.
Shared Variables and shared submodules are ties.
"""

from flax_tied_lora._nnx.merge import base as base
from flax_tied_lora._nnx.merge import merge as merge
from flax_tied_lora._nnx.merge import quantize as quantize
from flax_tied_lora._nnx.module import AdaptedModule as AdaptedModule
from flax_tied_lora._nnx.module import LoRADropout as LoRADropout
from flax_tied_lora._nnx.module import Scaling as Scaling
from flax_tied_lora._nnx.module import Slot as Slot
from flax_tied_lora._nnx.step import Step as Step
from flax_tied_lora._nnx.step import step as step
from flax_tied_lora._nnx.trace import explain as explain
from flax_tied_lora._nnx.trace import trace as trace
from flax_tied_lora._nnx.verbs import adapted as adapted
from flax_tied_lora._nnx.verbs import from_adapted as from_adapted
from flax_tied_lora._nnx.verbs import params as params
from flax_tied_lora._nnx.verbs import wrap as wrap

__all__ = [
    "AdaptedModule",
    "LoRADropout",
    "Scaling",
    "Slot",
    "Step",
    "adapted",
    "base",
    "explain",
    "from_adapted",
    "merge",
    "params",
    "quantize",
    "step",
    "trace",
    "wrap",
]
