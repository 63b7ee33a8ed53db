"""Whether a regex may backtrack without a bound: Python's `re` cannot be stopped while it matches.

A pattern that somebody else wrote is refused where it may; see `problem`. A small scanner that
knows less than `re` does and errs on the side of refusal.
"""

from __future__ import annotations

import dataclasses
import re

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|N\{[^}]*\}|[0-9]{1,3}|.)", re.DOTALL)
_OPENING = re.compile(
    r"\((?:\?(?:P<\w+>|P=\w+|\(\w+\)|[:>=!]|<[=!]|#[^)]*|[aiLmsux]*(?:-[imsx]+)?[:)]?))?"
)
_REPEAT = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})[?+]?")
# What may be repeated fewer times than this counts as written out.
_FEW = 8
# Of names of 100 characters, at 10 ns a step, these take 10 ms each at the worst.
_BESIDE, _TOTAL = 2, 12


@dataclasses.dataclass
class _Scan:
    """What has been read of a pattern.

    Attributes:
      open: whether since the last repetition nothing came that only one character matches.
      beside: repetitions right after another, each of which multiplies the time.
      total: repetitions.
      choices: what may be there or not, which doubles the time.
      problem: the first thing that may take time without bound.
    """

    pattern: str
    at: int = 0
    open: bool = False
    beside: int = 0
    total: int = 0
    choices: int = 0
    problem: str = ""

    def alternatives(self) -> list[str]:
        """Reads up to the end of a group; returns what each alternative begins with."""
        before, ends, firsts = self.open, [], []
        start = self.at
        while self.at < len(self.pattern) and self.pattern[self.at] != ")":
            if self.pattern[self.at] == "|":
                firsts.append(self.pattern[start : self.at])
                ends.append(self.open)
                self.at, self.open = self.at + 1, before
                start = self.at
            else:
                self._item()
        self.open = any([*ends, self.open])
        return [*firsts, self.pattern[start : self.at]]

    def _item(self) -> None:
        text, start = self.pattern, self.at
        before, inside, literal, alternatives = self.open, self._variable(), False, [""]
        around = False
        if text[start] == "(":
            opening = _OPENING.match(text, start)
            assert opening is not None  # a bracket alone matches
            self.at = opening.end()
            if opening[0].endswith(")"):
                return  # flags
            around = opening[0] in ("(?=", "(?!", "(?<=", "(?<!")
            if not opening[0].startswith(("(?#", "(?P=")):
                alternatives = self.alternatives()
            self.at += 1
        elif match := (_CLASS.match(text, start) or _ESCAPE.match(text, start)):
            self.at = match.end()
            literal = text[start] == "\\" and not match[0][1].isalnum()
        else:
            self.at, literal = start + 1, text[start] not in ".^$"
        if around:
            self.open = before
        least, most = self._repeated()
        inside = self._variable() - inside
        if most >= _FEW:
            self.total += 1
            self.beside += before
            self.open = True
        elif literal and least == most:
            self.open = False
        else:
            self.open |= before and not least
            self.choices += least != most
        if most > 1 and text[start] == "(":
            self._repeated_group(text[start : self.at], inside, alternatives)

    def _variable(self) -> int:
        return self.total + self.choices

    def _repeated(self) -> tuple[int, float]:
        """Reads how often what came before may be there, at least and at most."""
        match = _REPEAT.match(self.pattern, self.at)
        if match is None or (match[0] in ("{}", "{,}") and not match[1]):
            return 1, 1
        self.at = match.end()
        sign = match[0][0]
        if sign != "{":
            return int(sign == "+"), 1 if sign == "?" else float("inf")
        least = int(match[1] or 0)
        return least, least if not match[2] else float(match[3] or "inf")

    def _repeated_group(self, text: str, inner: int, alternatives: list[str]) -> None:
        firsts = [a[:1] for a in alternatives]
        plain = all(first.isalnum() or first == "_" for first in firsts)
        if inner:
            self.problem = self.problem or f"{text!r} repeats what is itself repeated"
        elif len(firsts) > 1 and not (plain and len(set(firsts)) == len(firsts)):
            self.problem = self.problem or f"{text!r} repeats alternatives that may begin alike"


def problem(pattern: str) -> str:
    r"""Returns why matching a valid regex may take very long; "" where it takes milliseconds.

    That is where a repeated group has a repetition inside, or alternatives which may begin with the
    same character; and where many repetitions follow on one another. Patterns that such a regex
    would serve are better listed.

    >>> problem(r".*\.layers\.(\d+)\.(self_attn|mlp)\.[qv]_proj")
    ''
    >>> problem("(a+)+q_proj")
    "'(a+)+' repeats what is itself repeated"
    """
    scan = _Scan(pattern)
    scan.alternatives()
    if scan.problem:
        return scan.problem
    if scan.beside > _BESIDE or max(scan.total, scan.choices) > _TOTAL:
        return (
            f"{scan.total} repetitions, {scan.beside} of them beside another, and {scan.choices} "
            "parts that may be left out"
        )
    return ""
