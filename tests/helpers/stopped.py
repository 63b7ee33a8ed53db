"""Runs of the demo that are stopped, and what they have come to."""

from __future__ import annotations

import itertools
import signal

import corpus
import finetune_smollm2
import jax
import numpy as np
import training


def state_in(options: list[str]) -> training.State:
    state = training.Job(finetune_smollm2.parser().parse_args(options)).restored()
    assert state is not None
    return state


def assert_same(found: training.State, expected: training.State) -> None:
    """Bit for bit, the optimizer's state and every step's loss included."""
    for name in ("step", "losses", "before"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("adapters", "scaling", "params"):
        pair = getattr(found.adapted, name), getattr(expected.adapted, name)
        jax.tree.map(np.testing.assert_array_equal, *pair)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, expected.opt_state)
    assert found.adapted.plan is expected.adapted.plan


def interrupt_at(monkeypatch, number: int) -> None:
    """Presses Ctrl-C while the step of this number (from 0) is being prepared."""

    def batches(tokens, batch, length, seed, start=0):
        whole = whole_batches(tokens, batch, length, seed, start)
        for step, rows in zip(itertools.count(start), whole, strict=False):
            if step == number:
                signal.raise_signal(signal.SIGINT)
            yield rows

    whole_batches = corpus.batches
    monkeypatch.setattr(corpus, "batches", batches)
