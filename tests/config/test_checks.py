"""LoraConfig: bad input, one line a case; each error names the field."""

from __future__ import annotations

import pytest

from flax_tied_lora import LoraConfig

# What is refused with which error, and how it is named.
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
    (
        ValueError,
        {"lora_alpha": 1e39},
        r"lora_alpha=1e\+39 .*1\.2e-38 to 3\.4e\+38, which a float32",
    ),
    (ValueError, {"lora_alpha": 10**39}, "lora_alpha=10{39} .*which a float32 scaling holds"),
    (ValueError, {"lora_alpha": 1e-50}, "lora_alpha=1e-50 .*which a float32 scaling holds"),
    (
        ValueError,
        {"alpha_pattern": {"q": 1e39}},
        r"alpha_pattern\['q'\]=1e\+39 .*a float32 scaling",
    ),
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
    (ValueError, {"init_lora_weights": "pissa_niter_-1"}, "pissa_niter_-1' .*'pissa_niter_<k>'"),
    (ValueError, {"init_lora_weights": "pissa_niter_"}, "'pissa_niter_' .*an int k from 0"),
    (TypeError, {"init_lora_weights": None}, "init_lora_weights=None .*'orthogonal'"),
    (ValueError, {"bias": "some"}, "bias='some' .*'none' or 'all' or 'lora_only'"),
    (TypeError, {"use_dora": 1}, "use_dora=1 .*True or False"),
    (TypeError, {"fan_in_fan_out": "yes"}, "fan_in_fan_out='yes' .*True or False"),
    (TypeError, {"ensure_weight_tying": 1}, "ensure_weight_tying=1 .*None or True or False"),
    (TypeError, {"modules_to_save": "lm_head"}, "modules_to_save='lm_head' .*a list of strings"),
    (TypeError, {"modules_to_save": [1]}, r"modules_to_save=\[1\] .*found 1"),
    (ValueError, {"modules_to_save": [""]}, "modules_to_save=.*an empty string"),
    (TypeError, {"target_parameters": "up"}, "target_parameters='up' .*a list of strings"),
    (TypeError, {"target_parameters": {"up": 1}}, "target_parameters=.*a list of strings"),
    (ValueError, {"target_parameters": ["up", ""]}, "target_parameters=.*an empty string"),
    (TypeError, {"trainable_token_indices": 3}, "trainable_token_indices=3 .*a list of ints"),
    (TypeError, {"trainable_token_indices": "3"}, "trainable_token_indices='3' .*a list of ints"),
    (TypeError, {"trainable_token_indices": [True]}, "trainable_token_indices=.*an int from 0"),
    (TypeError, {"trainable_token_indices": [1.0]}, "trainable_token_indices=.*an int from 0"),
    (ValueError, {"trainable_token_indices": [1, -2]}, "from 0, found -2"),
    (ValueError, {"trainable_token_indices": [1, 2, 1]}, r"found \[1\] more than once"),
    (ValueError, {"trainable_token_indices": []}, "trainable_token_indices=.*at least one token"),
    (ValueError, {"trainable_token_indices": {}}, "trainable_token_indices=.*at least one table"),
    (TypeError, {"trainable_token_indices": {"w": 1}}, r"indices\['w'\]=1 .*a list of ints"),
    (TypeError, {"trainable_token_indices": {1: [1]}}, "strings as keys, found 1"),
    (TypeError, {"trainable_token_indices": {"w": [False]}}, r"indices\['w'\]=.*an int from 0"),
    (ValueError, {"trainable_token_indices": {"w": []}}, r"indices\['w'\]=.*at least one token"),
    (ValueError, {"trainable_token_indices": {"w": [-1]}}, r"indices\['w'\]=.*found -1"),
    (ValueError, {"trainable_token_indices": {"w": [2, 2]}}, r"\['w'\]=.*more than once"),
    (ValueError, {"trainable_token_indices": {"": [2]}}, "names of tables, found an empty"),
    (
        ValueError,
        {"trainable_token_indices": {"a.w": [1]}, "modules_to_save": ["a/w"]},
        r"a.w named in both trainable_token_indices and modules_to_save",
    ),
    (
        ValueError,
        {"trainable_token_indices": {"a/w": [1]}, "modules_to_save": ["b", "a.w"]},
        r"a/w named in both trainable_token_indices and modules_to_save",
    ),
    (
        ValueError,
        {"target_parameters": ["up"], "lora_dropout": 0.5},
        "lora_dropout=0.5 does not go with target_parameters",
    ),
    (
        ValueError,
        {"target_parameters": ["up"], "use_dora": True},
        "use_dora=True does not go with target_parameters",
    ),
    (
        ValueError,
        {"target_parameters": ["up"], "fan_in_fan_out": True},
        "fan_in_fan_out=True does not go with target_parameters",
    ),
    (
        ValueError,
        {"r": 3, "init_lora_weights": "orthogonal"},
        "r=3 with init_lora_weights='orthogonal'; expected an even rank, such as 4",
    ),
    (
        ValueError,
        {"init_lora_weights": "orthogonal", "rank_pattern": {"q": 1}},
        r"rank_pattern\['q'\]=1 with init_lora_weights='orthogonal'",
    ),
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


@pytest.mark.parametrize("value", ["eva", "corda", "loftq", "mica", "lora_ga"])
def test_known_initialisation_is_refused(value):
    with pytest.raises(NotImplementedError, match=f"init_lora_weights='{value}'"):
        LoraConfig(init_lora_weights=value)


def test_json_that_is_none():
    with pytest.raises(ValueError, match="not JSON"):
        LoraConfig.from_json("{r: 8}")
    with pytest.raises(TypeError, match="expected a mapping, found \\[1\\]"):
        LoraConfig.from_json("[1]")
