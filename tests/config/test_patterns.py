"""Mappings from patterns to values: as PEFT's ``get_pattern_key`` reads them, however many."""

from __future__ import annotations

import random
import re
import time

import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._config.patterns import FrozenMapping, is_name, pattern_value

MANY = 900_000


def peft(patterns, path):
    """Returns what PEFT's ``get_pattern_key`` finds, each pattern tried in turn."""
    dotted = path.replace("/", ".")
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern.replace('/', chr(92) + '.')})$", dotted):
            return value
    return patterns.get(path, patterns.get(dotted))


@pytest.mark.parametrize("seed", range(20))
def test_looked_up_as_if_each_pattern_were_tried_in_turn(seed):
    draw = random.Random(seed)
    pieces = ["a", "b", "ab", ".", "/", "_", "1", r"\d", "(a|b)", ".*", "a+", "-", ":"]

    def drawn(among):
        return "".join(draw.choice(among) for _ in range(draw.randint(1, 6)))

    patterns = {}
    while len(patterns) < 40:
        patterns[drawn(pieces if draw.random() < 0.3 else pieces[:7])] = len(patterns)
    mapping = FrozenMapping({p: v for p, v in patterns.items() if p.strip("./")})
    for _ in range(200):
        path = drawn(["a", "b", "ab", "/", ".", "_", "1", "a+"])
        assert pattern_value(mapping, path, None) == peft(dict(mapping), path), path


def test_a_dot_in_a_name_matches_any_character():
    mapping = FrozenMapping({"layers.1.q": 1, "layers/2/q": 2})
    assert is_name("layers.1.q")
    assert is_name("layers/2/q")
    assert not is_name("q+")
    assert pattern_value(mapping, "model/layers_1_q", 0) == 1
    assert pattern_value(mapping, "model/layers_2_q", 0) == 0
    assert pattern_value(mapping, "model/layers/2/q", 0) == 2


@pytest.mark.parametrize(
    "field",
    ["target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern",
     "rank_pattern", "alpha_pattern", "trainable_token_indices", "layers_to_transform"],
)  # fmt: skip
def test_900_000_names_or_numbers_take_under_five_seconds(field):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(MANY)]
    value = {
        "rank_pattern": dict.fromkeys(names, 4),
        "alpha_pattern": dict.fromkeys(names, 4),
        "trainable_token_indices": range(50_000, 50_000 + MANY),
        "layers_to_transform": range(MANY),
    }.get(field, names)
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [0], field: value}
    start = time.process_time()
    config = tied_lora.LoraConfig(**fields)
    assert time.process_time() - start < 5
    assert len(getattr(config, field)) == MANY
