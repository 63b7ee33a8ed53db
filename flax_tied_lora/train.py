"""Training with Optax: gradients of the adapters only, labels for them, LoRA+."""

from flax_tied_lora._train.gradients import value_and_grad as value_and_grad
from flax_tied_lora._train.labels import labels as labels
from flax_tied_lora._train.labels import labels_by as labels_by
from flax_tied_lora._train.lora_plus import lora_plus as lora_plus

__all__ = [
    "labels",
    "labels_by",
    "lora_plus",
    "value_and_grad",
]
