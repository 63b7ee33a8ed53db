"""Conversations to train on: JSON lines of messages, of which the assistant's are learned.

A line is ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}``, as
Hugging Face's and OpenAI's tools have it, or the list alone. What a conversation looks like to the
model is its tokenizer's chat template. All that is not the assistant's counts nothing in the loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpus
import numpy as np

Messages = list[dict[str, Any]]
Span = tuple[int, int]


def read(*paths: str | Path) -> list[tuple[str, Messages]]:
    """Returns the conversations of files of JSON lines, each with its place: file and line.

    Raises:
      ValueError: a line is none; it is named by its number.
    """
    result = []
    for path in paths:
        for number, line in enumerate(corpus.read_text(path).splitlines(), 1):
            if line.strip():
                place = f"{path}, line {number}"
                result.append((place, _conversation(place, line)))
    return result


def _conversation(place: str, line: str) -> Messages:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{place} is no JSON ({error}): expected a conversation in each line"
        ) from None
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{place}: expected {{"messages": [...]}} or a list of messages')
    for message in messages:
        known = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not known or not isinstance(message.get("content"), str):
            raise ValueError(
                f'{place}: {json.dumps(message)[:80]} is no message: expected {{"role": ..., '
                '"content": ...}, both of them text'
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{place} has no message of the assistant: nothing of it could be learned")
    return messages


def prompt(tokenizer: Any, text: str) -> str:
    """Returns what the model is given to answer a user's message.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    return _shown(tokenizer, "--prompt", [{"role": "user", "content": text}], answer=True)


def _shown(tokenizer: Any, place: str, messages: Messages, *, answer: bool = False) -> str:
    """Returns messages by the chat template; with ``answer``, up to where the assistant's begins.

    A template refuses what it does not know (roles, their order) with errors of its own.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template: --format chat needs one")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # Jinja's, or any that a template raises
        raise ValueError(f"{place}: the model's chat template refuses it: {error}") from error


def spans(tokenizer: Any, place: str, messages: Messages) -> list[tuple[str, list[Span]]]:
    """Returns a conversation as texts, with the places of the assistant's messages in each.

    It is one text where the template only ever appends. Where it shows an earlier message otherwise
    once others follow it (Qwen 3 drops its reasoning), it is a text for each such message, as the
    model had it before it when it was to answer.

    Raises:
      ValueError: the template refuses the messages, or its prompt does not begin its answer.
    """
    texts: list[tuple[str, list[Span]]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _shown(tokenizer, place, messages[:number], answer=True)
        whole = _shown(tokenizer, place, messages[: number + 1])
        if not whole.startswith(before):
            raise ValueError(
                f"{place}: by the model's chat template, message {number + 1} does not go on from "
                "what is before it, so that the two cannot be told apart"
            )
        own = (len(before), len(whole))
        if texts and whole.startswith(texts[-1][0]):
            texts[-1] = (whole, [*texts[-1][1], own])
        else:
            texts.append((whole, [own]))
    return texts


def rows_of(
    tokenizer: Any, conversations: Sequence[tuple[str, Messages]], length: int
) -> tuple[corpus.Rows, int]:
    """Returns conversations as rows, one to a row, padded with what counts nothing.

    Args:
      tokenizer: a fast one of transformers, with a chat template.
      conversations: from ``read``.
      length: how many tokens of a row the model reads; what is longer is cut.

    Returns:
      The rows, of which each has something to learn; and how many were cut.

    Raises:
      ValueError: there is no such row, or the template refuses a conversation.
    """
    tokens, weights, cut = [], [], 0
    for place, messages in conversations:
        for text, own in spans(tokenizer, place, messages):
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = np.asarray(found["input_ids"], np.int32)
            starts = np.asarray([start for start, _ in found["offset_mapping"]])
            learned = np.zeros(len(ids), np.float32)
            for begin, end in own:
                learned[(starts >= begin) & (starts < end)] = 1
            cut += len(ids) > length + 1
            if not learned[1 : length + 1].any():
                continue
            space = (0, max(length + 1 - len(ids), 0))
            tokens.append(np.pad(ids[: length + 1], space))
            weights.append(np.pad(learned[: length + 1], space)[1:])
    if not tokens:
        raise ValueError(
            f"no conversation has an answer that begins within {length} tokens: raise --length"
        )
    return corpus.Rows(np.stack(tokens), np.stack(weights)), cut
