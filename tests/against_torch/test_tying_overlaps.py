"""One table named in two fields: what real PEFT does, pinned, and ours.

PEFT has no LoRA and replaced rows on one module (a TypeError), and leaves LoRA out without a word
where a module is saved as a whole. A full copy and replaced rows on one module are an error, or a
model that cannot be called.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import flax_tied_lora as tied_lora
from tests.against_torch.test_tying_tables import one_leaf, two_leaves
from tests.against_torch.tying_tables import EMBED, HEAD, SAVE, TARGET, TOKENS, llama, run_peft

pytestmark = pytest.mark.models

LORA, ROWS_ = "lora", "trainable_tokens"
NONE_LEFT, NO_ROWS, TWICE = "NoMatchingPeftModuleError", "TypeError", "ValueError"
UNUSABLE = "called: ValueError"

# The fields; what untied PEFT does with them; what it does with a tied model, flag False and True:
# what embed_tokens and lm_head get, or an exception.
CASES: list[tuple[dict[str, Any], Any, Any, Any]] = [
    ({TOKENS: [1, 2], TARGET: [EMBED]}, NO_ROWS, NO_ROWS, NO_ROWS),
    ({TOKENS: {HEAD: [1, 2]}, TARGET: [HEAD]}, NO_ROWS, NO_ROWS, NO_ROWS),
    # Rows of a tied embedding are rows of the head too, which has LoRA: the same.
    ({TOKENS: [1, 2], TARGET: [HEAD]}, (ROWS_, LORA), NO_ROWS, NO_ROWS),
    ({TOKENS: {HEAD: [1]}, TARGET: [EMBED]}, (LORA, ROWS_), (LORA, ROWS_), NO_ROWS),
    ({TOKENS: [1, 2], SAVE: [EMBED], TARGET: ["q_proj"]}, UNUSABLE, UNUSABLE, TWICE),
    ({TOKENS: [1, 2], SAVE: [HEAD], TARGET: ["q_proj"]}, (ROWS_, SAVE), UNUSABLE, TWICE),
    ({TOKENS: {EMBED: [1]}, SAVE: [EMBED], TARGET: ["q_proj"]}, TWICE, TWICE, TWICE),
    ({SAVE: [EMBED], TARGET: [EMBED]}, NONE_LEFT, NONE_LEFT, NONE_LEFT),
    ({SAVE: [EMBED], TARGET: [EMBED, "q_proj"]}, (SAVE, None), (SAVE, None), (SAVE, SAVE)),
    ({SAVE: [HEAD], TARGET: [EMBED, "q_proj"]}, (LORA, SAVE), (LORA, SAVE), (SAVE, SAVE)),
    ({SAVE: [EMBED], TARGET: [HEAD, "q_proj"]}, (SAVE, LORA), (SAVE, LORA), NO_ROWS),
    ({SAVE: [EMBED], TARGET: ".*(embed_tokens|q_proj)"}, (SAVE, None), (SAVE, None), (SAVE, SAVE)),
]


@pytest.mark.parametrize(("fields", "untied", "tied_false", "tied_true"), CASES, ids=str)
def test_peft_does_this(fields, untied, tied_false, tied_true):
    for tied, flag, expected in (
        (False, False, untied), (True, False, tied_false), (True, True, tied_true)
    ):  # fmt: skip
        record = run_peft(llama(tied), **fields, ensure_weight_tying=flag, r=2)
        kinds = {name.removeprefix("model."): kind for name, kind in record.kinds.items()}
        broken = f"called: {record.broken}" if record.broken else ""
        found = record.error or broken or (kinds.get(EMBED), kinds.get(HEAD))
        assert found == expected, (tied, flag)


def wrap(model: tuple[Any, Any, Any], flag: bool | None, **fields: Any) -> dict[str, list[str]]:
    """Returns the kinds of adapters that our `wrap` gives each group."""
    params, sites, ties = model
    config = tied_lora.LoraConfig(r=2, ensure_weight_tying=flag, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tied_lora.WeightTyingWarning)
        plan = tied_lora.wrap(params, config, sites=sites, ties=ties).plan
    return {g.key: sorted(a.kind for a in g.adapters) for g in plan.groups if g.adapters}


@pytest.mark.parametrize("flag", [None, False, True])
@pytest.mark.parametrize("model", [one_leaf, lambda: two_leaves(True)], ids=["one", "two"])
@pytest.mark.parametrize("saved", [EMBED, HEAD])
@pytest.mark.parametrize("tokens", [[1, 2], {EMBED: [1, 2]}, {HEAD: [1, 2], EMBED: [1, 2]}])
def test_ours_refuses_rows_of_what_is_saved_as_a_whole(model, flag, saved, tokens):
    """Where PEFT does not, its model cannot be called."""
    with pytest.raises(ValueError, match="modules_to_save"):
        wrap(model(), flag, **{TOKENS: tokens, SAVE: [saved], TARGET: ["q_proj"]})


@pytest.mark.parametrize("flag", [None, False, True])
@pytest.mark.parametrize(
    "targets",
    ["all-linear", r".*\.(q_proj|v_proj)", ["q_proj", "v_proj"]],
    ids=str,
)
def test_ours_leaves_lora_out_where_a_module_is_saved_as_a_whole(targets, flag):
    """As PEFT: else "all-linear" could not be had with a full copy of one kernel."""
    found = wrap(two_leaves(True), flag, **{SAVE: ["q_proj"], TARGET: targets})
    kinds = {key.split("/")[-2]: kind for key, kind in found.items()}
    assert kinds["q_proj"] == [SAVE]
    assert kinds["v_proj"] == ["lora"]
    with pytest.raises(ValueError, match="modules_to_save"):
        wrap(two_leaves(True), flag, **{SAVE: ["q_proj"], TARGET: ["q_proj"]})
