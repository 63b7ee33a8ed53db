"""Training with Optax: gradients of the adapters only, labels for them, LoRA+.

`value_and_grad` differentiates a loss with respect to the adapters::

    loss, grads = train.value_and_grad(loss_fn)(adapted, tokens)
    updates, state = optimizer.update(grads, state, adapted.adapters)
    adapted = adapted.replace(adapters=optax.apply_updates(adapted.adapters, updates))

`labels` and `labels_by` say which optimizer or learning rate is for which array, for
`optax.partition` and `optax.masked`. `lora_plus` is an optimizer with the learning rates of LoRA+.
"""

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
