"""The checks behind `LoraConfig`: each takes a field's name and value and returns what to store.

All raise errors of the form "LoraConfig: field=value (type); expected ...".
"""

from __future__ import annotations

import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from flax_tied_lora._config.patterns import FrozenMapping, check_inside, is_name
from flax_tied_lora._tree.paths import Listed

_V = TypeVar("_V")
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
PISSA_NITER = re.compile(r"pissa_niter_([0-9]+)")
Bias = Literal["none", "all", "lora_only"]
TaskType = Literal[
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]
_Named = Literal[True, False, "gaussian", "pissa", "olora", "orthogonal"]
# Any number of iterations will do, of which a type can only list some.
Initialisation = _Named | Literal["pissa_niter_4", "pissa_niter_8", "pissa_niter_16"]
_ONLY_PEFTS = ("eva", "corda", "loftq", "mica", "lora_ga")


def positive_int(field: str, value: Any) -> int:
    """Returns an int above 0."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise _wrong(TypeError, field, value, "an int above 0")
    if value <= 0:
        raise _wrong(ValueError, field, value, "an int above 0")
    return int(value)


def positive(field: str, value: Any) -> int | float:
    """Returns a finite number above 0, in float32 too, as scalings are; an int stays an int."""
    number = _real(field, value, "a finite number above 0")
    if not 0 < number < math.inf:
        raise _wrong(ValueError, field, value, "a finite number above 0")
    if not _LEAST <= number <= _MOST:
        raise _wrong(
            ValueError, field, value, f"{_LEAST:.2g} to {_MOST:.2g}, which a float32 scaling holds"
        )
    return number


def probability(field: str, value: Any) -> float:
    """Returns a float in [0, 1)."""
    expected = "a number from 0 up to, not including, 1"
    number = _real(field, value, expected)
    if not 0 <= number < 1:
        raise _wrong(ValueError, field, value, expected)
    return float(number)


def boolean(field: str, value: Any) -> bool:
    """Returns True or False, and takes nothing else for one."""
    if not isinstance(value, bool):
        raise _wrong(TypeError, field, value, "True or False")
    return value


def text(field: str, value: Any) -> str | None:
    """Returns a string or None."""
    if value is not None and not isinstance(value, str):
        raise _wrong(TypeError, field, value, "a string or None")
    return value


def task_type(field: str, value: Any) -> str | None:
    """Returns one of PEFT's task types, or None."""
    return None if value is None else one_of(field, value, get_args(TaskType))


def one_of(field: str, value: Any, choices: Sequence[Any], more: str = "") -> Any:
    """Returns `value`, which must be one of the choices, in type too (1 is not True).

    Args:
        field: The field's name.
        value: Its value.
        choices: What it may be.
        more: Ends the error's list of choices.
    """
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return value
    known_type = any(type(value) is type(choice) for choice in choices)
    expected = " or ".join(map(repr, choices)) + more
    raise _wrong(ValueError if known_type else TypeError, field, value, expected)


def initialisation(field: str, value: Any) -> bool | str:
    """Returns an initialisation that is carried out."""
    if value in _ONLY_PEFTS:
        raise not_carried_out(field, value, True)
    if isinstance(value, str) and PISSA_NITER.fullmatch(value):
        return value
    return one_of(field, value, get_args(_Named), " or 'pissa_niter_<k>' with an int k from 0")


def names(field: str, value: Any) -> tuple[str, ...] | str | None:
    """Returns a regex as it is, a list of names as a tuple, None as None."""
    if value is None:
        return None
    if isinstance(value, str):
        return regex(field, value)
    checked = _strings(field, value, "a list of strings, one string, or None")
    _no_duplicates(field, checked)
    return Listed(checked)


def layer_names(field: str, value: Any) -> tuple[str, ...] | str | None:
    """Returns what `names` does, of regexes that can each be part of a longer one."""
    checked = names(field, value)
    for pattern in as_tuple(checked):
        regex(field, pattern, inside=True)
    return checked


def name_list(field: str, value: Any) -> tuple[str, ...] | None:
    """Returns a list of names as a tuple, each once, or None; one string is no list.

    A name may come twice: PEFT adds a classifier's name to `modules_to_save`, there or not.
    """
    if value is None:
        return None
    return Listed(dict.fromkeys(_strings(field, value, "a list of strings or None")))


def token_indices(field: str, value: Any) -> tuple[int, ...] | FrozenMapping[Any] | None:
    """Returns token ids as a tuple, in their order, or a mapping from table names to such."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        expected = "a list of ints from 0, a dict of them by table name, or None"
        return _token_list(field, value, expected)
    if not value:
        raise _wrong(ValueError, field, value, "at least one table; None means no tokens")
    if "" in value:
        raise _wrong(ValueError, field, value, "the names of tables, found an empty string")
    return mapping(field, value, lambda f, v: _token_list(f, v, "a list of ints from 0"))


def indices(field: str, value: Any) -> tuple[int, ...] | int | None:
    """Returns layer indices: an int from 0, several as a tuple, or None."""
    if value is None:
        return None
    several = isinstance(value, list | tuple | set | frozenset | range)
    for item in value if several else [value]:
        if not isinstance(item, numbers.Integral) or isinstance(item, bool):
            raise _wrong(TypeError, field, value, "an int from 0, a list of them, or None")
        if item < 0:
            raise _wrong(ValueError, field, value, f"indices from 0, found {item}")
    if not several:
        return int(value)
    if not value:
        raise _wrong(ValueError, field, value, "at least one index; None means all layers")
    _no_duplicates(field, value)
    return tuple(int(i) for i in (sorted(value) if isinstance(value, set | frozenset) else value))


def patterns(field: str, value: Any, convert: Callable[[str, Any], _V]) -> FrozenMapping[_V]:
    """Returns a mapping from regexes to checked values; None is the empty one."""
    checked = mapping(field, {} if value is None else value, convert)
    for key in checked:
        regex(field, key, inside=True)
    return checked


def mapping(field: str, value: Any, convert: Callable[[str, Any], _V]) -> FrozenMapping[_V]:
    """Returns a mapping from strings to checked values."""
    if not isinstance(value, Mapping):
        raise _wrong(TypeError, field, value, "a dict")
    for key in value:
        if not isinstance(key, str):
            raise _wrong(TypeError, field, value, f"strings as keys, found {key!r}")
    return FrozenMapping({k: convert(f"{field}[{k!r}]", v) for k, v in value.items()})


def regex(field: str, value: str, inside: bool = False) -> str:
    """Returns a valid regex that is not empty; `inside`: one that can be part of a longer one."""
    if not value:
        raise _wrong(ValueError, field, value, "a name or a regex, found an empty string")
    if is_name(value):
        return value  # compiling it takes fifty times as long
    try:
        re.compile(value)
        if inside:  # "(?i)a" cannot be
            check_inside(value)
    except re.error as error:
        raise _wrong(ValueError, field, value, f"a regex; {error}") from error
    return value


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Returns checked names as a tuple: none for None, one for a string."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _real(field: str, value: Any, expected: str) -> int | float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _wrong(TypeError, field, value, expected)
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _strings(field: str, value: Any, expected: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise _wrong(TypeError, field, value, expected)
    for item in value:
        if not isinstance(item, str):
            raise _wrong(TypeError, field, value, f"strings in the list, found {item!r}")
        if not item:
            raise _wrong(ValueError, field, value, "names, found an empty string")
    # Sets have no order of their own: sort, so that equal sets make equal configs.
    return tuple(sorted(value) if isinstance(value, set | frozenset) else value)


def _token_list(field: str, value: Any, expected: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | set | frozenset | range):
        raise _wrong(TypeError, field, value, expected)
    if not value:
        raise _wrong(ValueError, field, value, "at least one token; leave the field out for none")
    checked = indices(field, value)
    assert isinstance(checked, tuple)  # not one int: that is refused above
    return checked


def _no_duplicates(field: str, value: Any) -> None:
    double = sorted(item for item, count in Counter(value).items() if count > 1)
    if double:
        raise _wrong(ValueError, field, value, f"each once, found {double} more than once")


def _wrong(kind: type[Exception], field: str, value: Any, expected: str) -> Exception:
    return kind(f"LoraConfig: {field}={value!r} ({type(value).__name__}); expected {expected}")


def reads_weight(how: Any) -> bool:
    """Returns whether `from_weight` makes the factors that ``init_lora_weights`` names."""
    return isinstance(how, str) and (
        how == "pissa" or how.lower() == "olora" or PISSA_NITER.fullmatch(how) is not None
    )


def not_carried_out(field: str, value: Any, default: Any) -> NotImplementedError:
    """Returns the error for what PEFT has and this version does not carry out."""
    return NotImplementedError(
        f"LoraConfig: {field}={value!r} is not carried out by this version; expected "
        f"{default!r}, the default. Leave it out."
    )
