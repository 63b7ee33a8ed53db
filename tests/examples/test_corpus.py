"""The demo's text: nothing trained on is held out, and a resumed run sees the same batches."""

from __future__ import annotations

import itertools

import corpus
import numpy as np
import pytest

TOKENS = np.arange(1000, dtype=np.int32)


def first(count: int, *args, **kwargs) -> list[np.ndarray]:
    return list(itertools.islice(corpus.batches(*args, **kwargs), count))


def test_documentation_text_is_long_english_prose():
    text = corpus.documentation_text()
    assert len(text) > 300_000
    assert 'The "assert" statement' in text
    assert text == corpus.documentation_text()


def test_read_text_joins_files(tmp_path):
    (tmp_path / "a.txt").write_text("first é", encoding="utf-8")
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    assert corpus.read_text(tmp_path / "a.txt", str(tmp_path / "b.txt")) == "first é\nsecond"


def test_read_text_names_a_file_that_is_not_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes("abé".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: byte 2 is not UTF-8"):
        corpus.read_text(tmp_path / "latin.txt")


def test_split_holds_out_the_tail():
    train, held_out = corpus.split(TOKENS, 0.1)
    np.testing.assert_array_equal(np.concatenate([train, held_out]), TOKENS)
    assert len(held_out) == 100


@pytest.mark.parametrize("share", [0, 1, -0.1, 5])
def test_split_refuses_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=rf"held_out is {share}: expected a share"):
        corpus.split(TOKENS, share)


@pytest.mark.parametrize(("share", "count"), [(0.05, 3), (0.9, 1), (0.99, 4)])
def test_split_leaves_something_on_both_sides(share, count):
    with pytest.raises(ValueError, match=f"{share} of {count} leaves nothing to train on or to"):
        corpus.split(list(range(count)), share)


def test_rows_are_padded_to_whole_batches():
    rows = corpus.rows_of(TOKENS, 100)
    assert len(rows) == 9
    padded = rows.padded(4)
    assert padded.tokens.shape == (12, 101)
    np.testing.assert_array_equal(padded.weights[:9], 1)
    np.testing.assert_array_equal(padded.weights[9:], 0)
    assert len(rows.padded(3)) == 9
    np.testing.assert_array_equal(rows.take(slice(2, 4)).tokens, rows.tokens[2:4])


@pytest.mark.parametrize("length", [1, 7, 111, 999])
def test_windows_predict_each_token_once(length):
    rows = corpus.windows(TOKENS, length)
    assert rows.shape == (999 // length, length + 1)
    np.testing.assert_array_equal(rows[:, :-1].ravel(), TOKENS[: rows[:, :-1].size])
    np.testing.assert_array_equal(rows[:, 1:], rows[:, :-1] + 1)


def test_windows_of_a_short_text():
    with pytest.raises(ValueError, match=r"1000 tokens make no row of 1000 \+ 1 tokens"):
        corpus.windows(TOKENS, 1000)


def test_a_pass_covers_the_text_once():
    # 99 rows of 10 tokens in batches of 9: eleven batches, none left over.
    rows = np.concatenate(first(11, TOKENS, 9, 10, seed=0))
    starts = rows[:, 0]
    assert not np.array_equal(starts, np.sort(starts))
    np.testing.assert_array_equal(np.sort(starts), np.arange(0, 990, 10))


def test_passes_differ():
    two = first(22, TOKENS, 9, 10, seed=0)
    assert not np.array_equal(np.concatenate(two[:11]), np.concatenate(two[11:]))


@pytest.mark.parametrize("start", [1, 5, 6, 23])  # 6 batches in a pass
def test_a_resumed_run_sees_the_same_batches(start):
    whole = first(30, TOKENS, 16, 10, seed=3)
    resumed = first(30 - start, TOKENS, 16, 10, seed=3, start=start)
    np.testing.assert_array_equal(np.stack(whole[start:]), np.stack(resumed))
    assert whole[0].shape == (16, 11)
    assert whole[0].dtype == np.int32


def test_the_seed_decides_the_order():
    a, b, c = (first(6, TOKENS, 16, 10, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_too_large_a_batch():
    with pytest.raises(ValueError, match="99 rows make no batch of 100"):
        first(1, TOKENS, 100, 10, seed=0)
