"""The fine-tuning program on a small random Llama: its files, and its options."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> list[str]:
    """A small model and a text, as arguments of the program."""
    import corpus

    from tests.helpers import small_llama

    folder = tmp_path_factory.mktemp("files")
    small_llama.write(folder / "small")
    (folder / "text.txt").write_text(corpus.documentation_text()[:6000], encoding="utf-8")
    return [str(folder / "text.txt"), "--model", str(folder / "small")]


@pytest.fixture(scope="session")
def options(files) -> Callable[..., list[str]]:
    def of(output: Path, **changes: object) -> list[str]:
        values = {
            "output": output, "steps": 6, "save_every": 2, "evaluate_every": 2, "length": 32,
            "held_out_tokens": 200, "learning_rate": 0.02, "warmup": 2, "prompt": "The",
            "new_tokens": 4, "dropout": 0.1, **changes,
        }  # fmt: skip
        pairs = [("--" + k.replace("_", "-"), str(v)) for k, v in values.items()]
        return [*files, *itertools.chain(*pairs)]

    return of


@pytest.fixture(scope="session")
def whole_and_printed(options, tmp_path_factory) -> tuple[Path, str]:
    """The output of a run that nothing interrupted, and what it printed."""
    import finetune

    output, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        contextlib.redirect_stdout(printed),
    ):
        assert finetune.main(options(output)) == 0
    return output, printed.getvalue()


@pytest.fixture(scope="session")
def whole(whole_and_printed) -> Path:
    return whole_and_printed[0]
