"""The fine-tuning program on conversations."""

from __future__ import annotations

import json
import re

import finetune
import jax
import numpy as np
import pytest
from job import Job

from tests.helpers import small_llama
from tests.helpers.stopped import assert_same, interrupt_at, state_in

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"The {n}."},
        ]
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS), encoding="utf-8")
    return str(file)


@pytest.fixture
def chat_options(options, talks):
    def of(output, **changes):
        changes = {"format": "chat", "length": 64, "held_out": 0.2, **changes}
        return [talks, *options(output, **changes)[1:]]

    return of


def test_the_assistants_words_are_learned_and_no_others(chat_options, tmp_path, capsys):
    arguments = chat_options(tmp_path, new_tokens=8)
    assert finetune.main(arguments) == 0
    printed = capsys.readouterr().out
    described = r"talks.jsonl: 40 conversations; \d+ tokens to learn, \d+ held out\.$"
    assert re.search(described, printed, re.M)
    job, state = Job(finetune.options(arguments)), state_in(arguments)
    assert len(job.rows) == 32
    assert state.best[1] < state.held_out[0][1] - 0.5

    def by_hand(rows) -> float:
        logits = job.logits(job.params, rows.tokens[:, :-1])
        nats = -np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), rows.tokens[:, 1:, None], -1
        )[..., 0]
        answer = job.tokenizer("The", add_special_tokens=False)["input_ids"][0]
        for tokens, counts in zip(rows.tokens, rows.weights, strict=True):
            if counts.any():
                assert tokens[1:][counts > 0][0] == answer
        return float((nats * rows.weights).sum() / rows.weights.sum())

    assert state.held_out[0][1] == pytest.approx(by_hand(job.held_out), rel=1e-5)


def test_the_prompt_is_a_users_message(chat_options, tmp_path):
    job = Job(finetune.options(chat_options(tmp_path)))
    assert job.tokenizer.decode(job.prompt) == (
        "<|im_start|>user\nThe<|im_end|>\n<|im_start|>assistant\n"
    )


def test_interrupted_and_accumulated(chat_options, tmp_path, monkeypatch):
    changes = {"batch": 2, "accumulate": 2}
    whole, stopped = (chat_options(tmp_path / name, **changes) for name in ("whole", "stopped"))
    assert finetune.main(whole) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert finetune.main(stopped) == 130
    assert finetune.main(stopped) == 0
    assert_same(state_in(stopped), state_in(whole))


def refused(arguments, capsys) -> str:
    assert finetune.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_what_is_refused(chat_options, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(TALKS[0])}\n{{\n", encoding="utf-8")
    line = refused([str(tmp_path / "bad.jsonl"), *chat_options(tmp_path / "run")[1:]], capsys)
    assert re.search(r"bad\.jsonl, line 2 is no JSON", line)
    line = refused(chat_options(tmp_path / "run", length=4), capsys)
    assert "an answer that begins within 4 tokens: raise --length" in line
    other = small_llama.write(tmp_path / "other", template=None)
    line = refused(chat_options(tmp_path / "run", model=other), capsys)
    assert "the model's tokenizer has no chat template" in line
    assert not (tmp_path / "run").exists()
