"""`AdaptedModel`: a model object that takes ``params=``, with an `Adapted` in their place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Self

import jax
import numpy as np
from jax.typing import DTypeLike
from typing_extensions import ParamSpec, TypeVar

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._interpreter.context import OnDense
from flax_tied_lora._interpreter.tracing import filling
from flax_tied_lora._ties.lost import from_model, refuse_lost
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs.adapt import adapt
from flax_tied_lora._verbs.merge import merge
from flax_tied_lora._verbs.model_methods import REFUSED, SAVES, runs, settings, without_params

_OWN = ("_model", "_adapted", "_on_dense", "_jit", "_compiled")


_P = ParamSpec("_P", default=...)
_R = TypeVar("_R", default=Any)


@jax.tree_util.register_pytree_node_class
class AdaptedModel(Generic[_P, _R]):
    """A model object whose methods take ``params=``, with an `Adapted` in their place.

    For transformers' Flax models, and any object built like them; transformers is not needed.
    Every method that takes ``params`` (the call itself, ``generate``, ``encode``, ``decode``) is
    given the adapted ones through `adapt`, and compiled once for arguments of the same shapes and
    settings. Every other attribute is the model's. ``save_pretrained`` writes the merged model.

    Such a model, called without ``params=``, runs params of its own. Here it has none: what is kept
    is a shallow copy of the model with shapes in the place of its params, so that nothing can run
    unadapted, and no second copy of the weights is kept alive.

    A pytree whose leaves are those of the `Adapted`: pass it to `jax.jit` as an argument.

    Args:
      model: the model object. It stays as it is.
      adapted: what stands for its params.
      on_dense: as in `adapt`.
      jit: whether calls are compiled. If not, each call is traced anew, and NumPy arguments reach
        the model as they are.

    Raises:
      TypeError: the model has no method that takes ``params``; ``adapted`` is no `Adapted`; or, in
        a call, ``params`` is none.
      ValueError: ``on_dense`` is unknown; leaves that the model's config ties have other values; or
        `DensifyError`, in a call.

    Example::

      model = tied_lora.AdaptedModel(model, adapted)
      logits = model(tokens).logits
      sequences = model.generate(tokens, max_new_tokens=20, num_beams=2).sequences
    """

    def __init__(
        self,
        model: Callable[_P, _R],
        adapted: Adapted,
        *,
        on_dense: OnDense = "warn",
        jit: bool = True,
    ):
        if isinstance(model, AdaptedModel):
            raise TypeError("AdaptedModel: the model is an AdaptedModel; use its .replace(adapted)")
        names = ("__call__", *(n for n in dir(type(model)) if not n.startswith("_")))
        if isinstance(model, type) or not any(runs(model, name) for name in names):
            raise TypeError(
                f"AdaptedModel: {_named(model)} has no method that takes params=, as transformers' "
                "Flax models have; for a Flax module use tied_lora.adapt(module.apply)"
            )
        adapt(lambda: None, on_dense=on_dense)  # Refuses an unknown on_dense now, not in a call.
        self._model = without_params(model)
        self._adapted = _checked(adapted, "adapted")
        leaves, _ = flatten(self._adapted.params)
        refuse_lost("AdaptedModel", leaves, from_model(leaves, model))
        self._on_dense: OnDense = on_dense
        self._jit = jit
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @property
    def adapted(self) -> Adapted:
        """What stands for the model's params; can be set."""
        return self._adapted

    @adapted.setter
    def adapted(self, adapted: Adapted) -> None:
        self._adapted = _checked(adapted, "adapted")

    @property
    def params(self) -> Adapted:
        """The same as `adapted`: it goes wherever ``params=`` does."""
        return self._adapted

    @params.setter
    def params(self, params: Adapted) -> None:
        self._adapted = _checked(params, "params")

    @property
    def model(self) -> Any:
        """The model object, with shapes where its own params were."""
        return self._model

    def replace(self, adapted: Adapted) -> Self:
        """Returns the same model with another `Adapted`; nothing is compiled again for it.

        Raises:
          TypeError: not an `Adapted`.
        """
        return self._with(_checked(adapted, "adapted"))

    def merge(
        self, *, dtype: DTypeLike | None = None, untie: Mapping[str, str] | None = None
    ) -> Any:
        """Returns plain params with the deltas added, for the unadapted model; see `merge`."""
        return merge(self._adapted, dtype=dtype, untie=untie)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Calls the model with the adapted params; arguments and results are the model's."""
        return self._run("__call__", self._model, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # Private names are not forwarded; copying and pickling ask for some before all is set.
        if name.startswith("_"):
            raise AttributeError(f"AdaptedModel has no attribute {name!r}")
        if name in REFUSED and hasattr(self._model, name):
            raise AttributeError(
                f"AdaptedModel: {name} would send the model's own params, which are not adapted; "
                "write the merged model with save_pretrained, and send that"
            )
        value = getattr(self._model, name)
        if not callable(value) or isinstance(value, type):
            return value
        if runs(self._model, name) or name in SAVES:
            return functools.wraps(value)(lambda *a, **k: self._run(name, value, a, k))
        return self._forgetting(value) if inspect.ismethod(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or isinstance(inspect.getattr_static(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        setattr(self._model, name, value)
        self._compiled.clear()

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(n for n in dir(self._model) if n[0] != "_")})

    def __repr__(self) -> str:
        return f"AdaptedModel({type(self._model).__name__}, {self._adapted!r})"

    def __copy__(self) -> Self:
        return self._with(self._adapted)

    def __reduce__(self) -> Any:
        make = functools.partial(AdaptedModel, on_dense=self._on_dense, jit=self._jit)
        return make, (self._model, self._adapted)

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Returns the `Adapted`, and all else."""
        return (self._adapted,), (self._model, self._on_dense, self._jit, _Same(self._compiled))

    @classmethod
    def tree_unflatten(cls, rest: Any, children: Sequence[Any]) -> Self:
        """Returns what `tree_flatten` took apart."""
        model = object.__new__(cls)
        values = (rest[0], *children, *rest[1:3], rest[3].value)
        for name, value in zip(_OWN, values, strict=True):
            object.__setattr__(model, name, value)
        return model

    def _with(self, adapted: Adapted) -> Self:
        _, rest = self.tree_flatten()
        return self.tree_unflatten(rest, (adapted,))

    def _forgetting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a method that may change the model: what was compiled is dropped after it."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                self._compiled.clear()

        return call

    def _run(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns a method's result with the adapted params put in."""
        bound = inspect.signature(method).bind(*args, **kwargs)
        named = bound.arguments if "params" in bound.signature.parameters else bound.kwargs
        given = named.get("params")
        adapted = self._adapted if given is None else _checked(given, "params")
        if not isinstance(adapted, Adapted):
            raise TypeError(
                "AdaptedModel: inside of adapt or explain it holds no Adapted; give them its "
                ".model, and params=model.adapted"
            )
        put = merge(adapted) if name in SAVES else adapted
        if "params" in bound.signature.parameters:
            bound.arguments["params"] = put
            args, kwargs = bound.args, bound.kwargs
        else:
            kwargs = {**kwargs, "params": put}
        if name in SAVES:
            return method(*args, **kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is adapted)
        places = tuple(i for i, x in enumerate(leaves) if x is adapted or _is_array(x))
        rest = [None if i in places else x for i, x in enumerate(leaves)]
        key = (name, treedef, places, tuple((type(x), x) for x in rest), settings(self._model))
        run = self._program(key, method, filling(treedef, rest, places))
        return run([leaves[i] for i in places])

    def _program(
        self, key: Any, method: Callable[..., Any], fill: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Returns a function of a call's arrays: compiled once for a key, if the key has a hash."""
        served = adapt(method, on_dense=self._on_dense)

        def run(values: Sequence[Any]) -> Any:
            args, kwargs = fill(values)
            return served(*args, **kwargs)

        try:
            hash(key)
        except TypeError:  # A setting without a hash: a list of tokens, say.
            return run
        return self._compiled.setdefault(key, jax.jit(run)) if self._jit else run


class _Same:
    """Something that is equal to itself only, in the static part of a pytree."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _named(model: Any) -> str:
    return f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__


def _checked(adapted: Any, name: str) -> Adapted:
    if not isinstance(adapted, Adapted):
        raise TypeError(
            f"AdaptedModel: {name} is a {type(adapted).__name__}; expected the Adapted that wrap "
            "returns. For plain params call the model itself"
        )
    return adapted
