"""What an `Adapted` says where it is taken for the params that it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

HINT = (
    "it takes the place of params where a function went through adapt, "
    'tied_lora.adapt(model.apply)({"params": adapted}, ...), or as AdaptedModel(model, adapted); '
    "adapted.params are the frozen params"
)


class NotParams:
    """Refuses what functions do with params, those that did not go through `adapt`.

    Raises:
      TypeError: or AttributeError where an attribute is asked for, as Python has it.
    """

    def __getitem__(self, key: Any) -> NoReturn:
        raise TypeError(f"Adapted[{key!r}]: {HINT}")

    def __iter__(self) -> NoReturn:
        raise TypeError(f"iter(Adapted): {HINT}")

    def __contains__(self, key: Any) -> NoReturn:
        # Flax's TrainState.create asks it, to make a state of the optimizer for all of it.
        raise TypeError(
            f"{key!r} in an Adapted: {HINT}. Of a TrainState, params=adapted.adapters are "
            "what is trained; in a step, adapted.replace(adapters=state.params)"
        )

    def __bool__(self) -> NoReturn:
        # transformers' Flax models do: ``params or self.params``.
        raise TypeError(f"bool(Adapted): {HINT}")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"an Adapted as an array: {HINT}")

    if not TYPE_CHECKING:  # to a type checker it would have any attribute

        def __getattr__(self, name: str) -> NoReturn:
            error = f"{type(self).__name__!r} object has no attribute {name!r}"
            # What asks whether there is an attribute hears no; copies ask before there are params.
            if hasattr(vars(self).get("params"), name):
                error += f": {HINT}"
            raise AttributeError(error, name=name, obj=self)
