"""The table of readers, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flax_tied_lora._peft.adapter import readers

PAGE = Path(__file__).parents[3] / "docs/serving-elsewhere.md"


def test_the_page_has_the_table():
    assert readers.page() in PAGE.read_text()


def test_every_feature_of_the_table_is_one():
    for reader in readers.READERS.values():
        assert set(reader.verdicts) <= set(readers.FEATURES)


@pytest.mark.parametrize(
    ("reader", "family", "verdict"),
    [
        ("vllm", "llama", "exact"), ("vllm", "gemma2", "refused"), ("sglang", "gemma2", None),
        ("llama.cpp", "gemma2", "refused"), ("peft", "gemma2", "exact"),
    ],
)  # fmt: skip
def test_tables_by_family(reader, family, verdict):
    assert readers.READERS[reader].verdict("table", family) == verdict


def test_problems_name_readers_and_what_to_do():
    (found,) = readers.problems(["tokens"], "llama", ["peft", "vllm", "llama.cpp"], silent=False)
    assert found == (
        "trained tokens (trainable_token_indices): vLLM 0.32.0 refuses it, llama.cpp "
        "llama-cpp-python 0.3.36 refuses it; plain=True writes it as factors alone"
    )
    assert not readers.problems(["tokens"], "llama", ["vllm"], silent=True)
