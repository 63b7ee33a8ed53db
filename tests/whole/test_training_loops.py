"""No training loop of the docs, the examples and the benchmarks has a step that copies the base.

Those of pages are asked when the pages run (`test_docs.py`); here are the programs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest

from tests.helpers import small_llama
from tests.helpers.loops import MAKERS, Loops
from tests.whole.test_docs import BLOCK, PAGES, ROOT, run_page

EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"
sys.path[1:1] = [str(EXAMPLES), str(BENCHMARKS)]

import _models  # noqa: E402
import corpus  # noqa: E402

pytestmark = pytest.mark.usefixtures("standard_promotion")
ON_A_MESH = "--mesh data=2,model=4 --width 16 --layers 1 --length 16 --rank 2 --steps 2"
FENCE = "```"


def loops_in(source: str) -> set[str]:
    loops = Loops()
    loops.compiled(source, "source", {})
    return loops.found


def test_every_loop_is_on_a_page_or_in_a_program_that_a_test_runs():
    pages = {p.name for p in PAGES if any(loops_in(b) for b in blocks(p) if ">>>" not in b)}
    programs = {
        f.name for d in (EXAMPLES, BENCHMARKS) for f in d.glob("*.py") if loops_in(f.read_text())
    }
    assert {"README.md", "training.md", "nnx.md", "meshes.md", "vocabulary.md"} <= pages
    assert programs == {
        "quickstart.py", "serve_many.py", "finetune_on_a_mesh.py", "job.py"
    }  # fmt: skip


def blocks(page: Path) -> list[str]:
    return [match[1] for match in BLOCK.finditer(page.read_text())]


def test_doctests_have_no_loops():
    shown = [b for page in PAGES for b in blocks(page) if ">>>" in b]
    assert not any(maker in block for block in shown for maker in MAKERS)


@pytest.mark.parametrize("name", ["quickstart", "serve_many"])
def test_a_script(name, monkeypatch):
    loops = Loops()
    loops.module(EXAMPLES / f"{name}.py", monkeypatch)
    loops.check(least=1)


def test_the_script_on_a_mesh(monkeypatch):
    loops = Loops()
    loops.module(EXAMPLES / "finetune_on_a_mesh.py", monkeypatch).main(ON_A_MESH.split())
    loops.check(least=1)


def test_the_fine_tuning_program(tmp_path, monkeypatch):
    small_llama.write(tmp_path / "small")
    (tmp_path / "text.txt").write_text(corpus.documentation_text()[:6000], encoding="utf-8")
    loops = Loops()
    loops.module(EXAMPLES / "job.py", monkeypatch)
    for name in ("training", "stages"):  # another test's have another job
        monkeypatch.delitem(sys.modules, name, raising=False)
    program = loops.module(EXAMPLES / "finetune.py", monkeypatch)
    options = "--steps 2 --length 32 --held-out-tokens 200 --warmup 1 --new-tokens 2"
    given = [str(tmp_path / "text.txt"), "--model", str(tmp_path / "small")]
    assert program.main([*given, "--output", str(tmp_path / "out"), *options.split()]) == 0
    loops.check(least=1)


def test_the_benchmarks():
    cases = _models.cases(_models.TINY)
    for name, case in cases.items():
        if isinstance(case, _models.Step):
            report = case.compiled.memory_analysis()
            written = sum(x.nbytes for x in jax.tree.leaves(case.carried))
            base = sum(x.nbytes for x in jax.tree.leaves(case.frozen))
            assert report.output_size_in_bytes - written < base / 2, name


COPIES = f"""{FENCE}python
import jax
import jax.numpy as jnp
import optax

import flax_tied_lora as tied_lora

params = {{"embed": {{"embedding": jnp.ones((64, 16))}}}}
adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=2, target_modules=["embed"]))
apply = tied_lora.adapt(lambda params, ids: params["embed"]["embedding"][ids].sum())
optimizer = optax.sgd(1e-3)
state = optimizer.init(adapted.adapters)


@jax.jit
def step(adapted, state, tokens):
    loss, grads = tied_lora.value_and_grad(apply)(adapted, tokens)
    updates, state = optimizer.update(grads, state, adapted.adapters)
    return adapted.replace(adapters=optax.apply_updates(adapted.adapters, updates)), state, loss


adapted, state, loss = step(adapted, state, jnp.arange(4))
{FENCE}
"""


def test_a_step_that_copies_is_found():
    with pytest.raises(AssertionError, match=r"page.md:16: the step returns 4,\d+ bytes beyond"):
        run_page(COPIES, "page.md")
    with pytest.raises(AssertionError, match="not called"):
        run_page(
            COPIES.replace("adapted, state, loss = step(adapted, state, jnp.arange(4))", ""),
            "page.md",
        )
    with pytest.raises(AssertionError, match="nothing compiles"):
        run_page(COPIES.replace("@jax.jit\n", ""), "page.md")
