"""Runs of the fine-tuning program that are stopped, and what they have come to."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import corpus
import finetune
import jax
import numpy as np
from job import Job, State


def state_in(options: list[str]) -> State:
    state = Job(finetune.options(options)).restored()
    assert state is not None
    return state


def assert_same(found: State, expected: State) -> None:
    """Bit for bit, the optimizer's state and every step's loss included."""
    for name in ("step", "losses", "held_out", "before"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("adapters", "scaling", "params"):
        pair = getattr(found.adapted, name), getattr(expected.adapted, name)
        jax.tree.map(np.testing.assert_array_equal, *pair)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, expected.opt_state)
    assert found.adapted.plan is expected.adapted.plan


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt_at(monkeypatch, number: int) -> None:
    """Presses Ctrl-C while the step of this number (from 0) is being prepared."""

    def order(rows, batch, seed, start=0):
        whole = whole_order(rows, batch, seed, start)
        for step, numbers in zip(itertools.count(start), whole, strict=False):
            if step == number:
                signal.raise_signal(signal.SIGINT)
            yield numbers

    whole_order = corpus.order
    monkeypatch.setattr(corpus, "order", order)
