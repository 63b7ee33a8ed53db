"""Text to train on, and batches of it that a resumed run sees again exactly.

The text is CPython's own documentation, which every Python carries, or any files of yours.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

Text = TypeVar("Text", np.ndarray, list)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of tokens, and which of them a model is to predict.

    Attributes:
      tokens: int32 [rows, length + 1]: inputs ``[:, :-1]``, targets ``[:, 1:]``.
      weights: float32 [rows, length], of the targets: 0 for what does not count in the loss.
    """

    tokens: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, numbers: np.ndarray | slice) -> Rows:
        return Rows(self.tokens[numbers], self.weights[numbers])

    def padded(self, batch: int) -> Rows:
        """Returns these rows and as many that count nothing as make whole batches of them."""
        more = ((0, -len(self) % batch), (0, 0))
        return Rows(np.pad(self.tokens, more), np.pad(self.weights, more))


def documentation_text() -> str:
    """Returns the language topics of CPython's own ``help()``: half a million letters of English.

    The text differs a little from one Python to the next.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def read_text(*paths: str | Path) -> str:
    """Returns the text of UTF-8 files, joined by newlines.

    Raises:
      ValueError: a file holds no text.
    """
    return "\n".join(map(_text, map(Path, paths)))


def _text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the files in it")
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8 text: convert the file first"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} holds a zero byte, as no text does: name a text file")
    if not text.strip():
        raise ValueError(f"{path} is empty: name a file with text")
    return text


def split(tokens: Text, held_out: float = 0.05) -> tuple[Text, Text]:
    """Splits off the last part of the text, so that no held-out text is ever trained on.

    Args:
      tokens: token ids, int32 [tokens], or anything else in order.
      held_out: the share of the text to hold out, between 0 and 1.

    Returns:
      The training tokens and the held-out tokens.

    Raises:
      ValueError: one of the two parts would be empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}: expected a share of the text, between 0 and 1")
    cut = round(len(tokens) * (1 - held_out))
    if not 0 < cut < len(tokens):
        raise ValueError(
            f"{held_out} of {len(tokens)} leaves nothing to train on or to hold out: give more "
            "text, or another --held-out"
        )
    return tokens[:cut], tokens[cut:]


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Cuts the text into rows of ``length`` tokens and the one after them.

    A row's last token is the next row's first, so that each token but the first is predicted once.

    Args:
      tokens: token ids, int32 [tokens].
      length: how many tokens of a row the model reads.

    Returns:
      A view of the text, int32 [rows, length + 1]: inputs ``[:, :-1]``, targets ``[:, 1:]``.
    """
    rows = (len(tokens) - 1) // length
    if rows < 1:
        raise ValueError(
            f"{len(tokens)} tokens make no row of {length} + 1 tokens: give more text or a "
            "shorter length"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length][:rows]


def rows_of(tokens: np.ndarray, length: int) -> Rows:
    """Returns the rows of a text, all of whose tokens are predicted; see ``windows``."""
    rows = windows(tokens, length)
    return Rows(rows, np.broadcast_to(np.float32(1), (len(rows), length)))


def order(rows: int, batch: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Returns the numbers of the rows of each training batch, without end.

    Each pass over the rows has its own order, drawn from ``seed`` and the number of the pass and
    from nothing else. Batch n is thus the same whether a run came to it by itself or was resumed
    there.

    Args:
      rows: how many rows there are.
      batch: rows in a batch. Rows that fill no whole batch sit out the pass, others the next one.
      seed: of the order, not negative.
      start: the number of the first batch.

    Returns:
      An iterator of integers [batch].

    Raises:
      ValueError: there are too few rows for a batch; here already, not at the first of them.
    """
    per_pass = rows // batch
    if per_pass < 1:
        raise ValueError(f"{rows} rows make no batch of {batch}: give more text or a smaller batch")

    def drawn(step: int) -> np.ndarray:
        number, place = divmod(step, per_pass)
        shuffled = np.random.default_rng((seed, number)).permutation(rows)
        return shuffled[place * batch : (place + 1) * batch]

    return map(drawn, itertools.count(start))


def batches(
    tokens: np.ndarray, batch: int, length: int, seed: int, start: int = 0
) -> Iterator[np.ndarray]:
    """Returns training batches of a text without end, in the order of ``order``.

    Args:
      tokens: token ids, int32 [tokens].
      length: see ``windows``.
      batch, seed, start: see ``order``.

    Returns:
      An iterator of int32 [batch, length + 1]: inputs ``[:, :-1]``, targets ``[:, 1:]``.

    Raises:
      ValueError: the text is too short for a batch; here already, not at the first of them.
    """
    rows = windows(tokens, length)
    return map(rows.__getitem__, order(len(rows), batch, seed, start))
