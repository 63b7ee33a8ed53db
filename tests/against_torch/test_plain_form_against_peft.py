"""Adapters in the plain form, in PEFT: the same logits as here."""

from __future__ import annotations

import pytest

from flax_tied_lora import arithmetic
from tests.against_torch.round_trip import (
    attention,
    config_in,
    load_there,
    logits_here,
    logits_there,
    model,
    moved,
)
from tests.against_torch.torch_models import far

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings("ignore::flax_tied_lora._planning.tying.WeightTyingWarning"),
]


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("kind", ["rslora", "patterns", "pissa", "tokens"])
def test_the_same_logits(name, kind, tmp_path):
    mine = model(name)
    projections = attention(mine.family)
    table, first = mine.family.targets[0], projections[0]
    fields = {
        "rslora": {"target_modules": [table, *projections], "use_rslora": True},
        "patterns": {
            "target_modules": [table, *projections], "rank_pattern": {first: 2},
            "alpha_pattern": {first: 3},
        },
        "pissa": {"target_modules": projections, "init_lora_weights": "pissa"},
        "tokens": {"target_modules": projections, "trainable_token_indices": [3, 95, 40]},
    }[kind]  # fmt: skip
    adapted = moved(mine.wrap(**fields))
    given = arithmetic.plain(adapted, mine.params) if kind == "pissa" else adapted
    mine.save(tmp_path, given, plain=True)
    config = config_in(tmp_path)
    assert config["lora_alpha"] == config["r"]
    expected = logits_here(mine, adapted)
    assert far(logits_there(mine, load_there(mine, tmp_path)), expected) < 5e-5
    assert far(expected, mine.base) > 1e-3
    assert far(logits_here(mine, mine.load(tmp_path)), expected) < 5e-5
