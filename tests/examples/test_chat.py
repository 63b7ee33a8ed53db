"""Conversations: what is learned of them, what is refused, and by which line."""

from __future__ import annotations

import json
import re

import chat
import numpy as np
import pytest

from tests.helpers import small_llama

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are the 12?"},
    {"role": "assistant", "content": "He, and she."},
    {"role": "user", "content": "Naïve!"},
    {"role": "assistant", "content": "The end."},
]
# As Qwen 3 has it: an earlier answer loses its reasoning, the last one has some.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n</think>\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learned(tokenizer, rows) -> list[str]:
    """Returns the text of each row that counts in the loss, a stretch at a time."""
    texts = []
    for tokens, weights in zip(rows.tokens, rows.weights, strict=True):
        assert weights.dtype == np.float32
        stretches = np.split(np.arange(len(weights)), np.flatnonzero(np.diff(weights)) + 1)
        texts.append(
            [tokenizer.decode(tokens[1:][s]) for s in stretches if weights[s[0]]]
        )  # fmt: skip
    return texts


def rows(conversations, length=110, template=small_llama.TEMPLATE):
    tokenizer = small_llama.tokenizer(template)
    found, cut = chat.rows_of(tokenizer, [("here", talk) for talk in conversations], length)
    return tokenizer, found, cut


def test_only_the_assistants_words_count():
    tokenizer, found, cut = rows([TALK[:3], TALK])
    one, two = learned(tokenizer, found)
    assert one == ["He, and she.<|im_end|>\n"]
    assert two == ["He, and she.<|im_end|>\n", "The end.<|im_end|>\n"]
    assert cut == 0
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(found.tokens[1]).startswith(whole)
    assert found.tokens.shape == (2, 111)


def test_a_template_that_shows_earlier_answers_otherwise():
    tokenizer, found, _ = rows([TALK], 120, REASONING)
    assert learned(tokenizer, found) == [
        ["<think>\n</think>\nHe, and she.<|im_end|>\n"],
        ["<think>\n</think>\nThe end.<|im_end|>\n"],
    ]


def test_long_ones_are_cut_and_those_without_an_answer_left_out():
    tokenizer, found, cut = rows([TALK, TALK[:3]], 75)
    assert cut == 1
    first, second = learned(tokenizer, found)
    assert first[0] == second[0]
    assert not any(text.startswith("The end") for text in first)
    with pytest.raises(ValueError, match="an answer that begins within 20 tokens: raise --length"):
        rows([TALK], 20)


def test_no_template():
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        rows([TALK], template=None)
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        chat.prompt(small_llama.tokenizer(None), "Hello")


def test_what_the_template_refuses():
    template = "{{ raise_exception('Only users and assistants!') }}"
    with pytest.raises(ValueError, match="here: the model's chat template refuses it: Only users"):
        rows([TALK], template=template)


def test_a_template_whose_prompt_does_not_begin_its_answer():
    prompt = "{% if add_generation_prompt %}Answer: {% else %}"
    template = prompt + "{{ messages[-1].content }}{% endif %}"
    with pytest.raises(ValueError, match=r"here: .* message 3 does not go on from what is before"):
        rows([TALK], template=template)


def test_the_prompt():
    text = chat.prompt(small_llama.tokenizer(), "Hello")
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_both_forms_of_a_line(tmp_path):
    lines = [json.dumps({"messages": TALK, "id": 7}), "", json.dumps(TALK[1:3])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(lines[0], encoding="utf-8")
    found = chat.read(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert [place.rpartition("/")[2] for place, _ in found] == [
        "a.jsonl, line 1", "a.jsonl, line 3", "b.jsonl, line 1",
    ]  # fmt: skip
    assert [talk for _, talk in found] == [TALK, TALK[1:3], TALK]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON .*: expected a conversation in each line"),
        ("plain text", "is no JSON"),
        ("{}", 'expected {"messages": [...]} or a list of messages'),
        ('{"messages": []}', 'expected {"messages": [...]} or a list'),
        ("7", "or a list of messages"),
        ('["hello"]', '"hello" is no message: expected {"role": ..., "content": ...}'),
        ('[{"role": "user"}]', "is no message"),
        ('[{"role": "user", "content": ["a"]}]', "both of them text"),
        ('[{"role": "user", "content": "a"}]', "has no message of the assistant"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, message):
    (tmp_path / "talks.jsonl").write_text(f"{json.dumps(TALK)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"talks\.jsonl, line 3.*") as raised:
        chat.read(tmp_path / "talks.jsonl")
    expected = re.escape(message).replace(r"\.\*", ".*").replace(r"\ \.\*", " .*")
    assert re.search(expected, str(raised.value))
