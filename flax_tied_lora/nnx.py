"""LoRA for `nnx.Module`: wrapped, called and trained as NNX has it.

`wrap` returns an `nnx.Module` that is called like the module was; its factors are `nnx.LoRAParam`.
Shared Variables and shared submodules are ties::

    adapted = tied_lora.nnx.wrap(model, config, rng=rngs)
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-3), wrt=nnx.LoRAParam)
    logits = adapted(tokens)
    plain = tied_lora.nnx.merge(adapted)

`adapted` and `from_adapted` convert to an `Adapted` and back, for `flax_tied_lora.peft`,
`checkpoint` and `arithmetic`.
"""

from flax_tied_lora._nnx.convert import adapted as adapted
from flax_tied_lora._nnx.convert import from_adapted as from_adapted
from flax_tied_lora._nnx.convert import params as params
from flax_tied_lora._nnx.explain import explain as explain
from flax_tied_lora._nnx.merge import base as base
from flax_tied_lora._nnx.merge import merge as merge
from flax_tied_lora._nnx.module import AdaptedModule as AdaptedModule
from flax_tied_lora._nnx.module import LoRADropout as LoRADropout
from flax_tied_lora._nnx.module import Scaling as Scaling
from flax_tied_lora._nnx.module import Slot as Slot
from flax_tied_lora._nnx.quantize import quantize as quantize
from flax_tied_lora._nnx.step import Step as Step
from flax_tied_lora._nnx.step import step as step
from flax_tied_lora._nnx.trace import Method as Method
from flax_tied_lora._nnx.trace import trace as trace
from flax_tied_lora._nnx.wrap import wrap as wrap

__all__ = [
    "AdaptedModule",
    "LoRADropout",
    "Method",
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
