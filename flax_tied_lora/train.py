"""Training with Optax: a step, gradients of the adapters only, labels for them, LoRA+.

`step` is a compiled training step, which writes no copy of the frozen params::

    step = train.step(loss_fn, optimizer)
    adapted, state, loss = step(adapted, state, tokens)

`value_and_grad` differentiates a loss with respect to the adapters. `labels` and `labels_by` say
which optimizer or learning rate is for which array, for `optax.partition` and `optax.masked`.
`lora_plus` is an optimizer with the learning rates of LoRA+.
"""

from flax_tied_lora._train.gradients import value_and_grad as value_and_grad
from flax_tied_lora._train.labels import labels as labels
from flax_tied_lora._train.labels import labels_by as labels_by
from flax_tied_lora._train.lora_plus import lora_plus as lora_plus
from flax_tied_lora._train.step import Step as Step
from flax_tied_lora._train.step import step as step

__all__ = [
    "Step",
    "labels",
    "labels_by",
    "lora_plus",
    "step",
    "value_and_grad",
]
