"""A constructor's keywords: one that is misspelt is answered with the fields that are near."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

from flax_tied_lora._config.as_dict import NOT_CARRIED_OUT

_Class = TypeVar("_Class", bound=type)
_FAMILIAR = {"rank": "r", "lora_rank": "r", "lora_r": "r", "alpha": "lora_alpha"}


def with_hints(cls: _Class) -> _Class:
    """Returns a dataclass of keywords whose constructor says what was meant by an unknown one.

    Its signature is the dataclass's, for people, editors and type checkers.
    """
    init: Any = cls.__init__
    known = [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **fields: Any) -> None:
        if args:
            raise TypeError(
                f"{cls.__name__}: expected keyword arguments only, found {args!r}; write r=8, ..."
            )
        for name in fields:
            if name not in known:
                hint = _hint(name, known, cls.__name__)
                raise TypeError(f"{cls.__name__}: unknown field '{name}'; {hint}")
        init(self, **fields)

    cls.__init__ = checked
    return cls


def _hint(name: str, known: Sequence[str], what: str) -> str:
    if name in NOT_CARRIED_OUT:
        return "PEFT has it, and this version does not carry it out; leave it out"
    near = [_FAMILIAR[name]] if name in _FAMILIAR else []
    near += [n for n in difflib.get_close_matches(name, known) if n not in near]
    return f"did you mean {' or '.join(near)}?" if near else f"see help({what})"
