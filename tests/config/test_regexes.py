"""Regexes from files: refused where matching one may take without bound, and nothing else is."""

from __future__ import annotations

import json
import re
import time

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._config.regexes import problem

NAME = "model.language_model.layers.13.self_attn.q_proj"
PLAIN = [
    r".*\.layers\.(\d+)\.(self_attn|mlp)\.[qv]_proj",
    r".*[/.](q|v)_proj",
    r"^(?!.*vision).*\.(q_proj|k_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:k_proj|v_proj|q_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention)\.(?:(?:k_proj|v_proj|q_proj)))",
    r"(.*\.)?(q_proj)$",
    r"[^.]+\.[^.]+\.[^.]+",
    r"(q|k|v)+",
    r"(?i)a.*",
    r"[]a]+",
    r"a\{b",
    r"model\.layers\.([0-9]|1[0-9]|2[0-3])\..*_proj",
    r"(?P<first>a)b(?P=first)",
    r"(?:visual|vision)\..*\.\d+\..*",
]
SLOW = [
    r"(([a-z_0-9]+\.?)+)+#",
    r"(a|a)*b",
    r"(a+)+",
    r"(.*)*",
    r"(\w|\d)+#",
    r"(a|ab)*c",
    r"(.*a){20}",
    r"((a{1,})){2,}",
    r"(.?)+#",
    r"(?:a?)*#",
    r".*.*.*.*.*#",
    r"(.*)(.*)(.*)(.*)#",
    r".{0,99}.{0,99}.{0,99}.{0,99}#",
    r"(?=(\w+)+#)a",
    "a?" * 30 + "a" * 30,
]


@pytest.mark.parametrize("pattern", PLAIN)
def test_what_people_write_is_taken(pattern):
    assert not problem(pattern)
    config = tied_lora.LoraConfig.from_dict({"target_modules": pattern})
    assert config.target_modules == pattern
    start = time.process_time()
    for _ in range(100):
        re.fullmatch(pattern, NAME)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "axes"])
def test_what_backtracks_is_refused_by_name(pattern, field):
    value = {"rank_pattern": {pattern: 2}, "axes": {pattern: (0, 1)}}.get(field, pattern)
    fields = {"target_modules": ["q_proj"], field: value}
    with pytest.raises(ValueError, match="may take hours to match") as caught:
        tied_lora.LoraConfig.from_json(json.dumps(fields))
    assert f"LoraConfig: {field}={pattern!r}" in str(caught.value)
    assert "List the names in its place" in str(caught.value)
    if field == "target_modules":  # the user's own is as in PEFT
        assert tied_lora.LoraConfig(target_modules=pattern).target_modules == pattern


def test_the_list_of_layer_patterns_is_read_too():
    fields = {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["h", "(a+)+"]}
    with pytest.raises(ValueError, match=r"layers_pattern='\(a\+\)\+' in a file"):
        tied_lora.LoraConfig.from_dict(fields)


def test_a_plan_with_the_users_own_pattern_is_read_back():
    params = {"body": {"q_proj": {"kernel": jnp.ones((4, 4))}}}
    config = tied_lora.LoraConfig(r=2, target_modules=r"(\w+[./])+q_proj")
    plan = tied_lora.wrap(params, config).plan
    assert type(plan).from_json(plan.to_json()) is plan
