"""LoraConfig: PEFT's fields one by one, hashing, JSON. Bad input is in test_checks.py."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle

import numpy as np
import pytest

from flax_tied_lora._config.as_dict import NOT_CARRIED_OUT
from flax_tied_lora._config.axes_and_parts import OWN_FIELDS
from flax_tied_lora._config.config import LoraConfig
from tests.helpers.peft_fields import DEFAULTS, PEFT_FIELDS

# Every field of PEFT's that is carried out, with a value of its own.
CARRIED = {
    "r": 4,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "embed_tokens"],
    "exclude_modules": ["lm_head"],
    "use_rslora": True,
    "lora_dropout": 0.25,
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0, 2],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 2, "layers.0.q_proj": 3},
    "alpha_pattern": {"q_proj": 2.5},
    "bias": "lora_only",
    "fan_in_fan_out": True,
    "modules_to_save": ["score"],
    "target_parameters": ["experts.up"],
    "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [3, 1]},
    "use_dora": True,
    "ensure_weight_tying": True,
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "base_model_name_or_path": "org/model",
    "revision": "main",
    "inference_mode": True,
    "peft_version": "0.21.2",
    "auto_mapping": {"base_model_class": "Net", "parent_library": None},
}
# These go with no value of CARRIED's own for three other fields; the rest all go together.
TOGETHER = {k: v for k, v in CARRIED.items() if k != "target_parameters"}
# Every field that is refused, with a value that PEFT takes.
REFUSED = {
    "init_lora_weights": "corda",
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "corda_config": {},
    "eva_config": {"rho": 1.0},
    "kasa_config": {"beta": 1.0},
    "layer_replication": [[0, 4], [2, 5]],
    "loftq_config": {"loftq_bits": 4},
    "lora_bias": True,
    "lora_ga_config": {},
    "megatron_config": {"a": 1},
    "megatron_core": "my.core",
    "monteclora_config": {},
    "qalora_group_size": 32,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"scale": 1.0},
}


def test_has_every_field_of_peft_that_is_carried_out_and_two_of_its_own():
    ours = {f.name for f in dataclasses.fields(LoraConfig)}
    assert ours == {*PEFT_FIELDS, *OWN_FIELDS} - set(NOT_CARRIED_OUT)
    assert not set(PEFT_FIELDS) & set(OWN_FIELDS)


def test_each_field_of_peft_is_carried_out_or_refused():
    assert set(CARRIED) | set(REFUSED) == set(PEFT_FIELDS)
    assert set(CARRIED) & set(REFUSED) == {"init_lora_weights"}  # by its value
    assert set(REFUSED) - {"init_lora_weights"} == set(NOT_CARRIED_OUT)


def test_defaults_are_those_of_peft():
    ours, theirs = LoraConfig().to_dict(), DEFAULTS
    differing = {name for name in theirs if ours[name] != theirs[name]}
    # peft_version is filled in by PEFT; None ties what is tied, which PEFT has no word for.
    assert differing == {"peft_version", "ensure_weight_tying"}
    assert ours["ensure_weight_tying"] is None
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("field", CARRIED)
def test_carried_out_field_keeps_its_value(field):
    needed = {"target_modules": ["v_proj"], "layers_to_transform": 1}
    config = LoraConfig(**{**needed, field: CARRIED[field]})
    assert config.to_dict()[field] == CARRIED[field]


@pytest.mark.parametrize("field", REFUSED)
def test_refused_field_is_named(field):
    with pytest.raises(NotImplementedError, match=rf"LoraConfig: {field}=.*the default"):
        LoraConfig.from_dict({field: REFUSED[field]})


@pytest.mark.parametrize("field", sorted(NOT_CARRIED_OUT))
def test_what_only_peft_has_is_no_parameter(field):
    assert field not in inspect.signature(LoraConfig).parameters
    with pytest.raises(TypeError, match=f"unknown field '{field}'; PEFT has it, and this version"):
        LoraConfig(**{field: NOT_CARRIED_OUT[field]})


def test_signature_shows_each_field_with_its_default():
    parameters = inspect.signature(LoraConfig).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        f.name: f.default for f in dataclasses.fields(LoraConfig)
    }
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters["bias"].annotation == "Bias"


VALUES = [
    ("ensure_weight_tying", [None, True, False]),
    ("bias", ["none", "all", "lora_only"]),
    ("init_lora_weights", [True, False, "gaussian", "pissa", "olora", "orthogonal"]),
    ("init_lora_weights", ["pissa_niter_0", "pissa_niter_16"]),
    ("use_dora", [True, False]),
    ("fan_in_fan_out", [True, False]),
    ("modules_to_save", [None, [], ["score", "lm_head"]]),
    ("target_parameters", [None, [], ["experts.up", "down"]]),
    ("trainable_token_indices", [None, [0], [5, 2], {"lm_head": [1]}, {"b": [2, 1], "a": [0]}]),
    ("target_modules", [None, ["q"], "q.*", "all-linear"]),
]


@pytest.mark.parametrize(("field", "values"), VALUES)
def test_takes_each_value_that_peft_takes(field, values):
    configs = [LoraConfig(**{field: value}) for value in values]
    assert [config.to_dict()[field] for config in configs] == values
    assert len(set(configs)) == len(values)


@pytest.mark.parametrize("field", ["target_parameters", "modules_to_save"])
def test_name_given_twice_counts_once(field):
    # PEFT adds "classifier" and "score" to the modules of a classification model, there or not.
    assert LoraConfig(**{field: ["score", "a", "score"]}).to_dict()[field] == ["score", "a"]
    assert LoraConfig(**{field: {"b", "a"}}) == LoraConfig(**{field: ["a", "b"]})


def test_tokens_keep_their_order_and_may_be_any_integers():
    config = LoraConfig(trainable_token_indices=[np.int64(7), 3])
    assert config.trainable_token_indices == (7, 3)
    assert type(config.trainable_token_indices[0]) is int
    assert LoraConfig(trainable_token_indices=range(2)).trainable_token_indices == (0, 1)
    assert config != LoraConfig(trainable_token_indices=[3, 7])
    by_name = LoraConfig(trainable_token_indices={"lm_head": (3,)})
    assert by_name.trainable_token_indices == {"lm_head": (3,)}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": ["up"]},
        {"modules_to_save": ["up"]},
        {"trainable_token_indices": [1]},
    ],
)
def test_no_target_modules_are_needed_where_something_else_is_trained(fields):
    for targets in ([], None):
        config = LoraConfig(target_modules=targets, **fields)
        assert config.to_dict()["target_modules"] == targets
    with pytest.raises(ValueError, match="target_modules is empty"):
        LoraConfig(target_modules=[], **dict.fromkeys(fields))
    with pytest.raises(ValueError, match="target_modules is empty"):
        LoraConfig(target_modules=[], modules_to_save=[])


@pytest.mark.parametrize("field", sorted(set(REFUSED) - {"init_lora_weights"}))
def test_refused_field_may_have_its_default_or_none(field):
    default = LoraConfig().to_dict().get(field)
    for value in (default, None):
        assert LoraConfig.from_dict({field: value}) == LoraConfig()


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().r = 4  # pyright: ignore
    with pytest.raises(TypeError):
        LoraConfig(rank_pattern={"q": 4}).rank_pattern["q"] = 8  # pyright: ignore


def test_equal_configs_are_equal_and_hash_alike():
    a = LoraConfig(target_modules=["q", "v"], rank_pattern={"q": 4}, r=8, lora_alpha=16)
    b = LoraConfig(
        r=np.int64(8), lora_alpha=16.0, target_modules=("q", "v"), rank_pattern={"q": np.int32(4)}
    )
    assert a == b
    assert hash(a) == hash(b)
    assert a != LoraConfig(target_modules=["v", "q"], rank_pattern={"q": 4}, lora_alpha=16)
    assert type(b.r) is int
    assert LoraConfig(target_modules={"v", "q"}) == LoraConfig(target_modules=["q", "v"])


def test_order_of_patterns_counts():
    a = LoraConfig(rank_pattern={"q": 4, ".*": 2})
    b = LoraConfig(rank_pattern={".*": 2, "q": 4})
    assert a != b
    assert (a.rank_for("q"), b.rank_for("q")) == (4, 2)
    assert LoraConfig.from_json(b.to_json()) == b


def test_copies_are_equal():
    config = LoraConfig(**TOGETHER)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert dataclasses.replace(config, r=2).r == 2
    with pytest.raises(ValueError, match="r=0"):
        dataclasses.replace(config, r=0)


def test_later_changes_to_the_input_do_not_matter():
    targets, ranks = ["q"], {"q": 4}
    config = LoraConfig(target_modules=targets, rank_pattern=ranks)
    targets.append("v")
    ranks["v"] = 2
    assert config == LoraConfig(target_modules=["q"], rank_pattern={"q": 4})


def test_prints_what_was_set_as_code():
    config = LoraConfig(lora_alpha=16, target_modules=["q"], rank_pattern={"q": 4}, use_rslora=True)
    shown = "LoraConfig(r=8, lora_alpha=16, target_modules=('q',), use_rslora=True, rank_pattern="
    assert repr(config) == shown + "{'q': 4})"
    assert eval(repr(config)) == config


def test_json_round_trip():
    config = LoraConfig(**TOGETHER)
    written = json.loads(config.to_json())
    assert LoraConfig.from_json(config.to_json()) == config
    assert LoraConfig.from_dict(config.to_dict()) == config
    assert written == config.to_dict()
    assert written["trainable_token_indices"] == CARRIED["trainable_token_indices"]
    assert json.loads(LoraConfig().to_json())["ensure_weight_tying"] is None
    assert list(written) == sorted(written)
    assert written["target_modules"] == ["q_proj", "embed_tokens"]
    assert list(written["rank_pattern"]) == ["q_proj", "layers.0.q_proj"]


def test_pattern_may_be_one_of_our_paths():
    config = LoraConfig(rank_pattern={"model/layers/0": 2, "a+b": 3})
    assert config.rank_for("model/layers/0") == config.rank_for("model.layers.0") == 2
    assert config.rank_for("model/layers/10") == 8
    assert config.rank_for("a+b") == 3
