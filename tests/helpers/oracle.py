"""The oracle: an adapted function equals the function of merged params, values and gradients.

`check` is what the other tests use. Both paths are compiled as one program, with the compiler's
expensive passes off: most of a check's time is compiling.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_tied_lora as tied_lora
from tests.helpers import compiling

# Relative to the largest entry of the array compared, or 1.
FLOAT32_TOLERANCE = 2e-5
# In units of bfloat16's rounding: what an adapted error may have beyond twice the merged one's, in
# gradients of the adapted argument; and in results and gradients of data, which are sums of two
# rounded parts, the weight's and the delta's, each of which may be larger than the sum.
BFLOAT16_FLOOR = 2.0
BFLOAT16_FLOOR_OF_SUMS = 3.0
_EPS = float(jnp.finfo(jnp.bfloat16).eps)

# A low-precision program rounds where it says so, fused or not.
_OPTIONS = {**compiling.quick(), "xla_allow_excess_precision": False}

_SCALING = 1.5
_OF_ADAPTED, _OF_DATA = "gradient of [0]", "gradient of [1]"


def wrapped(
    params: Any,
    targets: Sequence[str],
    *,
    r: int = 2,
    seed: int = 0,
    kind: str = "lora",
    **options: Any,
) -> tied_lora.Adapted:
    """Returns params wrapped for the targets, with random factors: deltas of the weights' size.

    Args:
      params: a pytree of arrays.
      targets: as `LoraConfig.target_modules`.
      r: rank.
      seed: of the factors.
      kind: of adapters: "lora", "dora", "rows" (factors, and rows 0 and 1 replaced) or "copy"; or
        "quantized", factors on a base that is stored quantised.
      **options: passed to `wrap`.
    """
    fields: dict[str, Any] = {
        "lora": {},
        "quantized": {},
        "dora": {"use_dora": True},
        "rows": {"trainable_token_indices": {name: [1, 0] for name in targets}},
        "copy": {"target_modules": None, "modules_to_save": targets},
    }[kind]
    fields = {"r": r, "lora_alpha": _SCALING * r, "target_modules": targets} | fields
    config = tied_lora.LoraConfig(**fields)
    options["ties"] = tied_lora.find_ties(
        params, options.pop("ties", "auto"), sites=options.get("sites")
    )
    # Wrapped on shapes alone: the factors that `wrap` draws would be thrown away.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    adapted = tied_lora.wrap(shapes, config, **options)
    leaves = dict(jax.tree_util.tree_leaves_with_path(params))
    stored = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], adapted.params)
    if kind == "quantized":
        stored = jax.tree.map(functools.partial(quantized, seed=seed), stored)
    scaling = jax.tree.map(lambda _: jnp.float32(_SCALING), adapted.scaling)
    return perturbed(adapted.replace(params=stored, scaling=scaling), seed)


def quantized(leaf: jax.Array, seed: int = 0) -> Any:
    """Returns a leaf in blocks of two along an even axis; where there is none, as it is."""
    even = [axis for axis in reversed(range(leaf.ndim)) if leaf.shape[axis] % 2 == 0]
    if not even or leaf.ndim < 2:
        return leaf
    qtype = ("int8", "nf4", "int4")[seed % 3]
    return tied_lora.QuantizedArray.of(leaf, qtype, even[seed % len(even)], 2)


def labelled(
    shape: tuple[int, ...],
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    *,
    r: int = 2,
    dtype: Any = jnp.float32,
    kind: str = "lora",
) -> tied_lora.Adapted:
    """Returns params ``{"dense": {"kernel": ...}}`` wrapped with these axes as rows and columns."""
    site = tied_lora.CallSite(
        "dense/kernel", "dot_general", role="projection", rows=rows, cols=cols
    )
    params = {"dense": {"kernel": array(*shape, seed=1, dtype=dtype)}}
    return wrapped(params, ["dense"], r=r, kind=kind, sites=tied_lora.CallSites((site,)))


def only(explained: tied_lora.Explanation, role: str) -> tuple[tied_lora.Read, ...]:
    """Returns the reads, having checked that there are some, all low rank, all of this role."""
    assert explained.reads
    assert {(r.served, r.site.role) for r in explained.reads} == {("low rank", role)}
    return explained.reads


def perturbed(adapted: tied_lora.Adapted, seed: int = 0, size: float = 0.5) -> tied_lora.Adapted:
    """Returns an `Adapted` with random factors in place of its own, so that no delta is zero."""
    numbers = np.random.default_rng(seed)
    adapters = jax.tree.map(
        lambda f: jnp.asarray(size * numbers.standard_normal(f.shape), f.dtype), adapted.adapters
    )
    return adapted.replace(adapters=adapters)


def array(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """Returns an array of standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def numbers(*shape: int, below: int, seed: int = 0, least: int = 0) -> jax.Array:
    """Returns an array of int32 numbers from ``least`` up to, not including, ``below``."""
    return jnp.asarray(np.random.default_rng(seed).integers(least, below, shape), jnp.int32)


def check(
    fn: Callable[..., Any],
    adapted: tied_lora.Adapted,
    *args: Any,
    on_dense: str = "error",
    reference: Callable[..., Any] | None = None,
    gradients: bool = True,
) -> tied_lora.Explanation:
    """Checks that ``adapt(fn)(adapted, *args)`` equals ``fn(merge(adapted), *args)``.

    Compared are all array results, and the gradients of their sum, randomly weighted, with respect
    to every floating-point array there is: factors, scaling, frozen params (of the merged side
    through `merge`; not those stored quantised) and arguments. A program with anything of lower
    precision than float32 in it is judged by the same program in float32: the adapted error is at
    most twice the merged one, plus two roundings of the largest entry.

    Args:
      fn: called ``fn(params, *args)``.
      adapted: its factors are used as they are; see `wrapped` and `perturbed`.
      *args: arrays are traced, floating-point ones differentiated too; the rest passes through.
      on_dense: as `adapt` has it; by default a weight that is added up is an error.
      reference: ``fn`` in float32, where casting its arguments does not make it that.
      gradients: False for what has no reverse-mode derivative.

    Returns:
      The call sites, as `explain` reports them.
    """
    compare(fn, adapted, *args, on_dense=on_dense, reference=reference, gradients=gradients)
    return tied_lora.explain(fn, adapted, *args)


def compare(
    fn: Callable[..., Any],
    adapted: tied_lora.Adapted,
    *args: Any,
    on_dense: str = "error",
    reference: Callable[..., Any] | None = None,
    gradients: bool = True,
) -> list[str]:
    """Does what `check` does; returns the messages of weights that were added up."""
    served = tied_lora.adapt(fn, on_dense=on_dense)  # type: ignore[arg-type]
    exact = reference is None and not _low((adapted, args))
    same = reference or fn

    def merged(adapted: Any, *args: Any) -> Any:
        return fn(tied_lora.merge(adapted), *args)

    def wide(adapted: Any, *args: Any) -> Any:
        adapted, args = jax.tree.map(_widened, (adapted, args))
        return same(tied_lora.merge(adapted), *args)

    arrays, rest = _parted((adapted, args), lambda _, x: isinstance(x, jax.Array | np.ndarray))
    paths = [served, merged] if exact else [served, merged, wide]

    def program(arrays: Any) -> list[Any]:
        operands = _joined(arrays, rest)
        return [_outcome(path, operands, gradients) for path in paths]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tied_lora.DensifyWarning)
        # The oracle differentiates frozen params on purpose.
        warnings.simplefilter("ignore", tied_lora.FrozenGradientWarning)
        lowered = jax.jit(program).lower(arrays)
    on_cpu = jax.default_backend() == "cpu"
    compiled = lowered.compile(compiler_options=_OPTIONS if on_cpu else None)
    outcomes = [_named(o) for o in compiled(arrays)]
    assert outcomes[0], "the function returned no arrays: nothing was compared"
    for name, ours in outcomes[0].items():
        theirs, *truth = (o[name] for o in outcomes[1:])
        assert ours.shape == theirs.shape, f"{name}: shape {ours.shape}, merged {theirs.shape}"
        assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}, merged {theirs.dtype}"
        if truth and (".scaling[" in name or (name.startswith(_OF_DATA) and ours.size == 1)):
            continue  # one sum over all of an array, mostly cancelled: its error says nothing
        _assert_close(name, ours, theirs, *truth)
    return [str(w.message) for w in caught if issubclass(w.category, tied_lora.DensifyWarning)]


def _outcome(fn: Callable[..., Any], operands: Any, gradients: bool) -> dict[str, Any]:
    """Returns a function's array results, and the gradients of their weighted sum."""
    floats, others = _parted(operands, _is_differentiated)

    def loss(floats: Any) -> tuple[jax.Array, list[Any]]:
        adapted, args = _joined(floats, others)
        outs = [x for x in jax.tree.leaves(fn(adapted, *args)) if isinstance(x, jax.Array)]
        outs = [part for x in outs for part in _real(x)]
        total = jnp.float32(0)
        for i, out in enumerate(x for x in outs if _is_float(x)):
            weights = array(*out.shape, seed=i)
            total += jnp.sum(out.astype(jnp.float32) * weights)
        return total, outs

    alone = loss(floats)[1]
    if not gradients:
        return {"result": alone}
    # What is differentiated may be computed otherwise: a custom derivative has a value of its own.
    grads, outs = jax.grad(loss, has_aux=True)(floats)
    return {"result": alone, "result beside gradients": outs, "gradient of": grads}


def _real(x: jax.Array) -> list[jax.Array]:
    """Returns the real and the imaginary part of a complex array; any other as it is."""
    return [x.real, x.imag] if jnp.issubdtype(x.dtype, jnp.complexfloating) else [x]


def _is_differentiated(name: str, x: Any) -> bool:
    return _is_float(x) and not name.endswith(".scales")  # a quantised array's


def _is_float(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)


def _low(tree: Any) -> bool:
    return any(_is_float(x) and x.dtype.itemsize < 4 for x in jax.tree.leaves(tree))


def _widened(x: Any) -> Any:
    return jnp.asarray(x, jnp.float32) if _is_float(x) and x.dtype.itemsize < 4 else x


def _parted(tree: Any, chosen: Callable[[Any], bool]) -> tuple[Any, tuple[list[Any], Any]]:
    """Returns the chosen leaves, by path, and what `_joined` needs to put them back."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path), x) for path, x in pairs]
    return {name: x for name, x in named if chosen(name, x)}, (named, treedef)


def _joined(taken: dict[str, Any], rest: tuple[list[Any], Any]) -> Any:
    pairs, treedef = rest
    return jax.tree.unflatten(treedef, [taken.get(name, x) for name, x in pairs])


def _named(outcome: Any) -> dict[str, np.ndarray]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(outcome)
    return {jax.tree_util.keystr(p, simple=True, separator=" "): np.asarray(x) for p, x in pairs}


def _assert_close(
    name: str, ours: np.ndarray, theirs: np.ndarray, truth: np.ndarray | None = None
) -> None:
    if not jnp.issubdtype(ours.dtype, jnp.floating):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        return
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs), err_msg=name)
    there = np.isfinite(theirs)
    if truth is None:
        size = max(1.0, np.max(np.abs(theirs), where=there, initial=0.0))
        error = np.max(np.abs(ours - theirs), where=there, initial=0.0)
        assert error <= FLOAT32_TOLERANCE * size, (
            f"{name}: differs by {error:.3g}, the largest entry being {size:.3g}\n"
            f"adapted:\n{ours}\nmerged:\n{theirs}"
        )
        return
    truth = truth.astype(np.float64)
    size = np.max(np.abs(truth), where=there, initial=0.0)
    mine, other = _rms(ours - truth, there), _rms(theirs - truth, there)
    floor = BFLOAT16_FLOOR if name.startswith(_OF_ADAPTED) else BFLOAT16_FLOOR_OF_SUMS
    assert mine <= 2 * other + floor * _EPS * size, (
        f"{name}: error {mine:.3g}, of the merged function {other:.3g}, the largest entry being "
        f"{size:.3g}\nadapted:\n{ours}\nmerged:\n{theirs}\nin float32:\n{truth}"
    )


def _rms(x: np.ndarray, there: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x), where=there))) if np.any(there) else 0.0
