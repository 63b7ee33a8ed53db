"""What cannot be stacked, put in a slot or selected, and what each error says."""

from __future__ import annotations

from typing import Any

import pytest

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS, TiedLM, init, wrapped

TABLE, UP = "embed_tokens/embedding", "up/kernel"
BOTH = ["embed_tokens", "up"]
MODEL = TiedLM()
PARAMS = init(MODEL)


def logits(params: Any, tokens: Any) -> Any:
    return MODEL.apply({"params": params}, tokens)


apply = tied_lora.adapt(logits, on_dense="error")


def one(seed: int, targets: Any = BOTH, **options: Any) -> tied_lora.Adapted:
    return wrapped(PARAMS, targets, seed=seed, **options)


def dora() -> tied_lora.Adapted:
    return one(1, use_dora=True)


def started() -> tied_lora.Adapted:
    return wrapped(PARAMS, ["up"], init_lora_weights="pissa")


CASES = [
    ("full", lambda: tied_lora.stack([one(1)] * 3, capacity=2), ValueError,
     "stack: 3 adapters do not fit in capacity=2"),
    ("no slots", lambda: tied_lora.stack([one(1)], capacity=0), ValueError, "int from 1"),
    ("half a slot", lambda: tied_lora.stack([one(1)], capacity=1.5), TypeError, "int from 1"),
    ("low rank", lambda: tied_lora.stack([one(1)], rank=1), ValueError,
     f"'{TABLE}' has rank 2, more than rank=1"),
    ("stacked twice", lambda: tied_lora.stack([tied_lora.stack([one(1)])]), ValueError,
     "one by one"),
    ("DoRA and LoRA", lambda: tied_lora.stack([one(1), dora()]), ValueError,
     f"stack: '{TABLE}' is DoRA in one and LoRA in another"),
    ("PiSSA with empty slots", lambda: tied_lora.stack([started()], capacity=2), ValueError,
     "stack: init_lora_weights='pissa'"),
    ("PiSSA selected", lambda: tied_lora.select(tied_lora.stack([started()]), 0), ValueError,
     "select: init_lora_weights='pissa'"),
    ("put where nothing is stacked", lambda: tied_lora.put(one(1), 0, one(2)), ValueError,
     r"put: lora_a of .* is \[12, 2\], expected \['slots', 12, 2\].*stack the adapters first"),
    ("put past the end", lambda: tied_lora.put(tied_lora.stack([one(1)]), 1, one(2)), ValueError,
     "put: slot is 1, and there are slots 0 to 0; .*capacity"),
    ("put at -1", lambda: tied_lora.put(tied_lora.stack([one(1)]), -1, one(2)), ValueError,
     "put: slot is -1"),
    ("put in two", lambda: tied_lora.put(tied_lora.stack([one(1)]), [0, 0], one(2)), ValueError,
     r"put: slot is \[2\]; expected one"),
    ("put a stack", lambda: tied_lora.put(tied_lora.stack([one(1)]), 0, tied_lora.stack([one(2)])),
     ValueError, "put: .*one by one"),
    ("put params", lambda: tied_lora.put(tied_lora.stack([one(1)]), 0, PARAMS), TypeError,
     "put: expected an Adapted"),
    ("put a higher rank", lambda: tied_lora.put(tied_lora.stack([one(1)]), 0, one(2, r=3)),
     ValueError, r"put: .* has rank 3, and there is room for 2; .*rank=3"),
    ("put another weight", lambda: tied_lora.put(tied_lora.stack([one(1, ["up"])]), 0, one(2)),
     ValueError, f"put: there is no room for '{TABLE}' .LoRA, rank 2.; these have it: '{UP}'"),
    ("put DoRA", lambda: tied_lora.put(tied_lora.stack([one(1)]), 0, dora()), ValueError,
     "put: .* is DoRA in one"),
    ("put other tokens", lambda: tied_lora.put(
        tied_lora.stack([one(1, trainable_token_indices={"embed_tokens": [1]})]), 0,
        one(1, trainable_token_indices={"embed_tokens": [1, 4]})), ValueError,
     r"put: .* replaces token 4, and there is room for tokens \[1\]"),
    ("put of another base", lambda: tied_lora.put(
        tied_lora.stack([one(1)]), 0, wrapped(init(MODEL, seed=7), BOTH)), ValueError,
     "put: the adapters are of different bases"),
    ("select past the end", lambda: tied_lora.select(tied_lora.stack([one(1)]), [0, 1]),
     ValueError, "select: slots is 1, and there are slots 0 to 0, or -1 for no adapter"),
    ("select a fraction", lambda: tied_lora.select(tied_lora.stack([one(1)]), 0.5), TypeError,
     "select: slots: found float.*expected an integer"),
    ("select by name", lambda: tied_lora.select(tied_lora.stack([one(1)]), "polite"), TypeError,
     "select: slots: found .*expected an integer"),
    ("select of one", lambda: tied_lora.select(one(1), 0), ValueError, "stack the adapters first"),
    ("stacked and not selected", lambda: apply(tied_lora.stack([one(1)]), TOKENS), ValueError,
     r"adapt: lora_a of .* is \[1, 12, 2\], expected \[12, 2\]: .*tied_lora.select\(stacked, 0\)"),
    ("selected and not mapped", lambda: apply(
        tied_lora.select(tied_lora.stack([one(1)]), [0, 0]), TOKENS), ValueError,
     r"adapt: .* for each of \[2\] examples, and the call is not mapped"),
    ("merged while stacked", lambda: tied_lora.merge(tied_lora.select(
        tied_lora.stack([one(1)]), [0, 0])), ValueError, "merged one by one"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "error", "words"), [c[1:] for c in CASES],
                         ids=[c[0] for c in CASES])  # fmt: skip
def test_refused(case, error, words):
    with pytest.raises(error, match=words):
        case()
