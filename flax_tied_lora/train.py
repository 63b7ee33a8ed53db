"""Training with Optax: a step, gradients of the adapters only, labels for them, LoRA+."""

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
