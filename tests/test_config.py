"""LoraConfig: PEFT's fields one by one, bad input, JSON, hashing, and the lookups beside PEFT's."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import peft
import pytest
from peft.utils.other import get_pattern_key

from flax_tied_lora._config import _NOT_YET, LoraConfig

PEFT_FIELDS = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}

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
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "base_model_name_or_path": "org/model",
    "revision": "main",
    "inference_mode": True,
    "peft_version": "0.21.2",
    "auto_mapping": {"base_model_class": "Net", "parent_library": None},
}
# Every field that is refused, with a value that PEFT takes.
REFUSED = {
    "bias": "all",
    "init_lora_weights": "pissa_niter_16",
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "corda_config": {},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 1.0},
    "fan_in_fan_out": True,
    "kasa_config": {"beta": 1.0},
    "layer_replication": [[0, 4], [2, 5]],
    "loftq_config": {"loftq_bits": 4},
    "lora_bias": True,
    "lora_ga_config": {},
    "megatron_config": {"a": 1},
    "megatron_core": "my.core",
    "modules_to_save": ["lm_head"],
    "monteclora_config": {},
    "qalora_group_size": 32,
    "runtime_config": peft.LoraRuntimeConfig(),
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {"scale": 1.0},
}


def test_has_every_field_of_peft_and_no_other():
    assert {f.name for f in dataclasses.fields(LoraConfig)} == set(PEFT_FIELDS)


def test_each_field_of_peft_is_carried_out_or_refused():
    assert set(CARRIED) | set(REFUSED) == set(PEFT_FIELDS)
    assert set(REFUSED) == set(_NOT_YET)


def test_defaults_are_those_of_peft():
    ours, theirs = LoraConfig().to_dict(), peft.LoraConfig().to_dict()
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
        LoraConfig(**{field: REFUSED[field]})


@pytest.mark.parametrize("value", [True, False])
def test_ensure_weight_tying_takes_none_only(value):
    with pytest.raises(NotImplementedError, match=f"ensure_weight_tying={value}"):
        LoraConfig(ensure_weight_tying=value)


@pytest.mark.parametrize(
    "value",
    ["eva", "olora", "pissa", "pissa_niter_4", "corda", "loftq", "orthogonal", "mica", "lora_ga"],
)
def test_known_initialisation_is_refused(value):
    with pytest.raises(NotImplementedError, match=f"init_lora_weights='{value}'"):
        LoraConfig(init_lora_weights=value)


@pytest.mark.parametrize("field", sorted(set(REFUSED) - {"bias", "init_lora_weights"}))
def test_refused_field_may_have_its_default_or_none(field):
    default = LoraConfig().to_dict().get(field)
    assert LoraConfig(**{field: default}) == LoraConfig(**{field: None}) == LoraConfig()


BAD = [
    (TypeError, {"rank": 8}, "unknown field 'rank'; did you mean r"),
    (TypeError, {"lora_alhpa": 8}, "unknown field 'lora_alhpa'; did you mean lora_alpha"),
    (TypeError, {"target_module": "q"}, "unknown field 'target_module'; did you mean target_modul"),
    (TypeError, {"zzz": 8}, "unknown field 'zzz'; see help"),
    (TypeError, {"r": "8"}, r"r='8' \(str\); expected an int above 0"),
    (TypeError, {"r": 8.0}, r"r=8.0 \(float\); expected an int"),
    (TypeError, {"r": True}, r"r=True \(bool\); expected an int"),
    (TypeError, {"r": None}, r"r=None \(NoneType\); expected an int"),
    (ValueError, {"r": 0}, "r=0 .*above 0"),
    (ValueError, {"r": -4}, "r=-4 .*above 0"),
    (TypeError, {"lora_alpha": "16"}, "lora_alpha='16' .*a finite number above 0"),
    (TypeError, {"lora_alpha": False}, "lora_alpha=False"),
    (ValueError, {"lora_alpha": 0}, "lora_alpha=0 .*above 0"),
    (ValueError, {"lora_alpha": -1.0}, "lora_alpha=-1.0"),
    (ValueError, {"lora_alpha": float("inf")}, "lora_alpha=inf .*finite"),
    (ValueError, {"lora_alpha": float("nan")}, "lora_alpha=nan .*finite"),
    (TypeError, {"lora_dropout": "0.1"}, "lora_dropout='0.1' .*a number from 0"),
    (ValueError, {"lora_dropout": -0.1}, "lora_dropout=-0.1 .*from 0"),
    (ValueError, {"lora_dropout": 1.0}, "lora_dropout=1.0 .*not including, 1"),
    (ValueError, {"lora_dropout": float("nan")}, "lora_dropout=nan"),
    (TypeError, {"use_rslora": 1}, "use_rslora=1 .*True or False"),
    (TypeError, {"inference_mode": "no"}, "inference_mode='no' .*True or False"),
    (TypeError, {"target_modules": 3}, "target_modules=3 .*a list of strings"),
    (TypeError, {"target_modules": {"q": 1}}, r"target_modules=.* \(dict\); expected a list"),
    (TypeError, {"target_modules": ["q", 1]}, "target_modules=.*found 1"),
    (ValueError, {"target_modules": []}, "target_modules is empty"),
    (ValueError, {"target_modules": ""}, "target_modules='' .*an empty string"),
    (ValueError, {"target_modules": ["q", ""]}, "target_modules=.*an empty string"),
    (ValueError, {"target_modules": ["q", "v", "q"]}, r"target_modules=.*\['q'\] more than once"),
    (ValueError, {"target_modules": "(q"}, r"target_modules='\(q' .*a regex; missing \)"),
    (TypeError, {"exclude_modules": 3}, "exclude_modules=3 .*a list of strings"),
    (ValueError, {"exclude_modules": "*"}, "exclude_modules='\\*' .*a regex"),
    (ValueError, {"exclude_modules": ["a", "a"]}, "exclude_modules=.*more than once"),
    (ValueError, {"target_modules": ["q", "v"], "exclude_modules": ["v"]}, "v named in both"),
    (ValueError, {"target_modules": "q.*", "exclude_modules": "q.*"}, "q.* named in both"),
    (TypeError, {"layers_to_transform": "1"}, "layers_to_transform='1' .*an int from 0"),
    (TypeError, {"layers_to_transform": [0, True]}, "layers_to_transform=.*an int from 0"),
    (ValueError, {"layers_to_transform": -1}, "layers_to_transform=-1 .*found -1"),
    (ValueError, {"layers_to_transform": []}, "layers_to_transform=.*None means all"),
    (ValueError, {"layers_to_transform": [1, 1]}, r"layers_to_transform=.*\[1\] more than once"),
    (ValueError, {"layers_to_transform": 0, "target_modules": "q"}, "layers_to_transform needs ta"),
    (
        ValueError,
        {"layers_pattern": "h", "target_modules": "all-linear"},
        "layers_pattern needs ta",
    ),
    (ValueError, {"layers_pattern": "h"}, "layers_pattern='h' needs layers_to_transform"),
    (TypeError, {"layers_pattern": 1}, "layers_pattern=1 .*a list of strings"),
    (ValueError, {"layers_pattern": ["(h"], "layers_to_transform": 0}, r"layers_pattern='\(h'"),
    (TypeError, {"rank_pattern": [("q", 4)]}, "rank_pattern=.*a dict"),
    (TypeError, {"rank_pattern": {1: 4}}, "rank_pattern=.*strings as keys, found 1"),
    (TypeError, {"rank_pattern": {"q": 4.0}}, r"rank_pattern\['q'\]=4.0 .*an int above 0"),
    (ValueError, {"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0 .*an int above 0"),
    (ValueError, {"rank_pattern": {"q(": 4}}, r"rank_pattern='q\(' .*a regex"),
    (ValueError, {"rank_pattern": {"(?i)q": 4}}, r"rank_pattern='\(\?i\)q' .*a regex"),
    (ValueError, {"alpha_pattern": {"q": -2}}, r"alpha_pattern\['q'\]=-2 .*above 0"),
    (ValueError, {"alpha_pattern": {"": 2}}, "alpha_pattern='' .*an empty string"),
    (TypeError, {"init_lora_weights": 1}, "init_lora_weights=1 .*True or False or 'gaussian'"),
    (ValueError, {"init_lora_weights": "pisa"}, "init_lora_weights='pisa' .*'gaussian'"),
    (ValueError, {"bias": "some"}, "bias='some' .*'none'"),
    (TypeError, {"bias": False}, "bias=False .*'none'"),
    (ValueError, {"peft_type": "IA3"}, "peft_type='IA3' .*'LORA'"),
    (ValueError, {"task_type": "CHAT"}, "task_type='CHAT' .*'CAUSAL_LM'"),
    (TypeError, {"task_type": 3}, "task_type=3 .*'CAUSAL_LM'"),
    (TypeError, {"revision": 3}, "revision=3 .*a string or None"),
    (TypeError, {"base_model_name_or_path": b"x"}, "base_model_name_or_path=.*a string or None"),
    (TypeError, {"auto_mapping": "Net"}, "auto_mapping='Net' .*a dict"),
    (TypeError, {"auto_mapping": {"a": 1}}, r"auto_mapping\['a'\]=1 .*a string or None"),
]


@pytest.mark.parametrize(("error", "fields", "message"), BAD, ids=[str(b[1]) for b in BAD])
def test_bad_input_is_named(error, fields, message):
    with pytest.raises(error, match=message):
        LoraConfig(**fields)
    with pytest.raises(error, match=message):
        LoraConfig.from_dict(fields)


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match=r"keyword arguments only, found \(8,\)"):
        LoraConfig(8)  # pyright: ignore


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
    config = LoraConfig(**{k: v for k, v in CARRIED.items() if k != "peft_type"})
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
    config = LoraConfig(**CARRIED)
    written = json.loads(config.to_json())
    assert LoraConfig.from_json(config.to_json()) == config
    assert LoraConfig.from_dict(config.to_dict()) == config
    assert written == config.to_dict()
    assert written["ensure_weight_tying"] is None
    assert list(written) == sorted(written)
    assert written["target_modules"] == ["q_proj", "embed_tokens"]
    assert list(written["rank_pattern"]) == ["q_proj", "layers.0.q_proj"]


def test_json_that_is_none():
    with pytest.raises(ValueError, match="not JSON"):
        LoraConfig.from_json("{r: 8}")
    with pytest.raises(TypeError, match="expected a mapping, found \\[1\\]"):
        LoraConfig.from_json("[1]")


def test_peft_reads_our_json(tmp_path):
    config = LoraConfig(**CARRIED)
    (tmp_path / "adapter_config.json").write_text(config.to_json())
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path)).to_dict()
    ours = config.to_dict()
    ours["target_modules"], ours["exclude_modules"] = {"q_proj", "embed_tokens"}, {"lm_head"}
    assert theirs == ours


def test_we_read_pefts_fields(tmp_path):
    theirs = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules=["v", "q"], r=4)
    fields = {k: v for k, v in theirs.to_dict().items() if k != "ensure_weight_tying"}
    expected = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q", "v"], r=4, peft_version=theirs.peft_version
    )
    assert LoraConfig.from_dict(fields) == expected


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lookups_equal_those_of_a_peft_model(use_rslora):
    import torch

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block()])
            self.xq_proj = torch.nn.Linear(16, 16)

    fields = {
        "r": 8,
        "lora_alpha": 12,
        "use_rslora": use_rslora,
        "target_modules": ["q_proj", "v_proj", "xq_proj"],
        "rank_pattern": {r"^layers\.0\.q_proj": 2, "q_proj": 4},
        "alpha_pattern": {r"layers\.\d+\.v_proj": 5, "v_proj": 6},
    }
    ours = LoraConfig(**fields)
    model = peft.get_peft_model(Net(), peft.LoraConfig(**fields)).base_model.model
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 5
    for name, layer in layers.items():
        for path in (name, name.replace(".", "/")):
            assert ours.rank_for(path) == layer.r["default"]
            assert ours.alpha_for(path) == layer.lora_alpha["default"]
            assert ours.scaling_for(path) == pytest.approx(layer.scaling["default"], rel=1e-12)


PARTS = ["q", "v", "qv", "layers", "0", "1"]
KEYS = ["q", "v", "^q", r"0\.q", "layers.0", r"layers\.\d+\.q", ".*v", "q|v", "[^.]*", "q+"]


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    st.lists(st.sampled_from(KEYS), unique=True, max_size=4),
)
def test_pattern_lookup_equals_pefts(parts, keys):
    ranks = {key: 100 + i for i, key in enumerate(keys)}
    dotted = ".".join(parts)
    expected = ranks.get(get_pattern_key(list(ranks), dotted), 8)
    config = LoraConfig(rank_pattern=ranks, alpha_pattern=ranks)
    assert config.rank_for(dotted) == config.rank_for("/".join(parts)) == expected
    assert config.alpha_for(dotted) == float(expected)


def test_pattern_may_be_one_of_our_paths():
    config = LoraConfig(rank_pattern={"model/layers/0": 2, "a+b": 3})
    assert config.rank_for("model/layers/0") == config.rank_for("model.layers.0") == 2
    assert config.rank_for("model/layers/10") == 8
    assert config.rank_for("a+b") == 3
