"""What is checked of a family of a library, and its row in docs/libraries/index.md."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import numpy as np
import optax
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora.names import Names
from flax_tied_lora.peft import load_adapter, save_adapter, save_merged
from tests.libraries import comparing
from tests.libraries.comparing import compiled, far
from tests.libraries.reference import TOKENS, Reference, params_of, reference

PAGE = Path(__file__).parents[2] / "docs" / "libraries" / "index.md"
UPDATE = "UPDATE_DOCS"


@dataclasses.dataclass(frozen=True)
class Held:
    """A family of a library, with what its row is made from.

    Attributes:
      library, family: as the row names them.
      reference: name of the same model in PyTorch.
      call: ``call(params, tokens)`` returns logits.
      like: params, or their shapes.
      names: of the family.
      table: path of the input embedding.
      targets: what is adapted, in the library's names.
      step: takes params and trains one step in the library's own idiom; returns the loss before it
        and behind it.
      idiom: what that is, for the row.
      ties: as in `tied_lora.wrap`; None: nothing is declared.
      exact: whether values are computed in float32 everywhere.
    """

    library: str
    family: str
    reference: str
    call: Callable[[Any, Any], Any]
    like: Any
    names: Names
    table: str
    targets: list[str]
    step: Callable[[Any], tuple[float, float]]
    idiom: str
    ties: Any = None
    exact: bool = True

    @property
    def pytorch(self) -> Reference:
        return reference(self.reference)

    @functools.cached_property
    def params(self) -> Any:
        """The reference's weights."""
        return params_of(self.pytorch, self.like, self.names)

    @functools.cached_property
    def sites(self) -> tied_lora.CallSites:
        return tied_lora.trace(self.call, self.params, TOKENS)

    @functools.cached_property
    def adapted(self) -> tied_lora.Adapted:
        declared = {} if self.ties is None else {"ties": self.ties}
        config = tied_lora.LoraConfig(r=2, lora_alpha=4, target_modules=self.targets)
        wrapped = tied_lora.wrap(self.params, config, sites=self.sites, **declared)
        return quarters(wrapped)


def optax_step(
    call: Callable[..., Any], params: Any, targets: list[str], ties: Any = None
) -> tuple[float, float]:
    """Trains one step of AdamW; returns the loss before it and behind it."""
    lora = tied_lora.LoraConfig(r=2, target_modules=targets)
    declared = {} if ties is None else {"ties": ties}
    adapted = tied_lora.wrap(params, lora, sites=tied_lora.trace(call, params, TOKENS), **declared)

    def loss(adapted: Any) -> Any:
        return comparing.loss_of(tied_lora.adapt(call)(adapted, TOKENS), TOKENS)

    optimizer = optax.adamw(1e-3)
    before, grads = compiled(tied_lora.value_and_grad(loss))(adapted)
    updates, _ = optimizer.update(grads, optimizer.init(adapted.adapters), adapted.adapters)
    adapters = optax.apply_updates(adapted.adapters, updates)
    return float(before), float(loss(adapted.replace(adapters=adapters)))


def quarters(adapted: tied_lora.Adapted) -> tied_lora.Adapted:
    """Returns adapters whose factors are quarters, so that what they merge to is exact, too."""
    numbers = np.random.default_rng(5)
    draw = lambda x: jax.numpy.asarray(numbers.integers(-1, 2, x.shape) / 4, x.dtype)  # noqa: E731
    return adapted.replace(adapters=jax.tree.map(draw, adapted.adapters))


def row_of(held: Held, folder: Path) -> tuple[str, ...]:
    """Returns the row of a family; raises AssertionError where one of its cells would not be true.

    Args:
      folder: an empty one, for files.
    """
    cells = (held.library, held.family, _tie(held), _low_rank(held), _as_merged(held))
    return (*cells, _step(held), _exchange(held, folder))


def _tie(held: Held) -> str:
    tied = [p for pair in held.ties for p in pair] if held.ties else [held.table]
    assert {s.role for p in tied for s in held.sites.of(p)} == {"lookup", "projection"}
    if held.ties is None:
        groups = {g.key: g for g in tied_lora.find_ties(held.params, sites=held.sites)}
        assert groups[held.table].found == ("data flow",)
        return "found"
    return "declared"


def _low_rank(held: Held) -> str:
    explanation = tied_lora.explain(held.call, held.adapted, TOKENS)
    explanation.assert_tied()
    assert {r.served for r in explanation.reads} == {"low rank"}, str(explanation)
    groups = held.adapted.plan.groups
    of = {m.path: g.key for g in groups for m in g.members}
    assert {of[r.site.leaf] for r in explanation.reads} == {g.key for g in groups}
    return f"{len(explanation.reads)} of {len(explanation.reads)}"


def _as_merged(held: Held) -> str:
    logits, grads = comparing.of_adapted(held.call, held.adapted, TOKENS)
    expected, expected_grads = comparing.of_merged(held.call, held.adapted, TOKENS)
    assert far(logits, expected) < 1e-5
    worst = far(*(jax.flatten_util.ravel_pytree(x)[0] for x in (grads, expected_grads)))
    # In bfloat16 a gradient is a sum of many rounded terms, in the merged model as well.
    assert worst < (1e-4 if held.exact else 2e-2), worst
    assert far(compiled(held.call)(held.params, TOKENS), expected) > 1e-2
    return "yes" if held.exact else "yes, bfloat16"


def _step(held: Held) -> str:
    before, after = held.step(held.params)
    assert after < before
    return held.idiom


def _exchange(held: Held, folder: Path) -> str:
    """Checks that PyTorch's base, PEFT's adapter and the merged directory are one model here."""
    theirs, call = held.pytorch, compiled(held.call)
    _near(call(held.params, TOKENS), theirs.logits)
    loaded = load_adapter(theirs.adapter, held.params, held.names, sites=held.sites)
    _near(compiled(tied_lora.adapt(held.call))(loaded, TOKENS), theirs.adapted_logits)
    merged = params_of(theirs, held.like, held.names, merged=True)
    _near(call(merged, TOKENS), theirs.adapted_logits)

    save_adapter(folder / "adapter", loaded, held.names)
    ours = load_file(folder / "adapter" / "adapter_model.safetensors")
    expected = load_file(theirs.adapter / "adapter_model.safetensors")
    for name in expected.keys() & ours.keys():
        np.testing.assert_allclose(ours[name], expected[name], 1e-6, err_msg=name)
    # PEFT writes the base's table as well, and of a tied head a second copy.
    odd = expected.keys() ^ ours.keys()
    assert {n for n in odd if "lora_" in n and "lm_head" not in n} == set()

    save_merged(folder / "merged", loaded, held.names, theirs.config)
    written = load_file(folder / "merged" / "model.safetensors")
    assert set(written) == set(theirs.merged)
    for name, weight in theirs.merged.items():
        np.testing.assert_allclose(written[name], weight, 1e-5, 1e-6, err_msg=name)
    return "yes"


def _near(found: Any, expected: np.ndarray) -> None:
    found = np.asarray(found, np.float32)[..., : expected.shape[-1]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def assert_in_page(row: tuple[str, ...], command: str) -> None:
    """Checks that docs/libraries/index.md has a row; writes it there where ``UPDATE_DOCS`` is set.

    Args:
      command: that runs the test.
    """
    line, start = (f"| {' | '.join(cells)}" for cells in (row, row[:2]))
    text = PAGE.read_text()
    if os.environ.get(UPDATE):
        lines = text.splitlines()
        old = [i for i, x in enumerate(lines) if x.startswith(f"{start} |")]
        place = old[0] if old else lines.index("<!-- rows end -->")
        lines[place : place + len(old)] = [f"{line} |"]
        text = "\n".join(lines) + "\n"
        PAGE.write_text(text)
    assert f"{line} |" in text.splitlines(), f"{PAGE.name} lacks {line}; run {UPDATE}=1 {command}"
