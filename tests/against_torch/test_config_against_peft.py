"""LoraConfig beside PEFT's own class: files in both directions, lookups, contradictions."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
import torch
from peft.utils.other import get_pattern_key

from flax_tied_lora import LoraConfig

# PEFT warns that such an adapter cannot be turned into one for the weights before PiSSA.
pytestmark = pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA")

NAMES = st.sampled_from(["q_proj", "v_proj", "embed_tokens", "layers.0.mlp", "lm_head"])
SOME = st.lists(NAMES, min_size=1, max_size=4, unique=True)
TOKENS = st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True)
NUMBERS = st.integers(1, 1000) | st.floats(0.001, 1000)
STRINGS = st.none() | st.text(max_size=8)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "r": st.integers(1, 512),
    "lora_alpha": NUMBERS,
    "target_modules": st.none() | SOME | st.sampled_from(["all-linear", r".*\.(q|v)_proj"]),
    "exclude_modules": st.none() | SOME | st.just("a|b"),
    "use_rslora": st.booleans(),
    "lora_dropout": st.floats(0, 0.99),
    "init_lora_weights": st.sampled_from(
        [True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"]
    ),
    "layers_to_transform": st.none() | st.integers(0, 9) | TOKENS,
    "layers_pattern": st.none() | st.just("h") | SOME,
    "rank_pattern": st.dictionaries(NAMES, st.integers(1, 512)),
    "alpha_pattern": st.dictionaries(NAMES, NUMBERS),
    "target_parameters": st.none() | SOME,
    "use_dora": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "fan_in_fan_out": st.booleans(),
    "modules_to_save": st.none() | st.just([]) | SOME,
    "trainable_token_indices": st.none() | TOKENS | st.dictionaries(NAMES, TOKENS, min_size=1),
    "ensure_weight_tying": st.sampled_from([None, True, False]),
    "task_type": st.none() | st.sampled_from([task.value for task in peft.TaskType]),
    "base_model_name_or_path": STRINGS,
    "revision": STRINGS,
    "inference_mode": st.booleans(),
    "peft_version": st.text(max_size=8),
    "auto_mapping": st.none() | st.dictionaries(st.text(max_size=4), STRINGS),
}


@st.composite
def fields(draw) -> dict[str, Any]:
    """Some fields with values of their own, such that they do not contradict each other."""
    chosen = draw(st.fixed_dictionaries({}, optional=FIELDS))
    chosen.setdefault("peft_version", "0.21.2")  # else PEFT fills it in
    hypothesis.assume(consistent(chosen))
    return chosen


def consistent(chosen: dict[str, Any]) -> bool:
    try:
        LoraConfig(**chosen)
    except ValueError:
        return False
    return True


def through_peft(folder, text: str) -> dict[str, Any]:
    """Returns the fields in the file that PEFT writes after it has read this one."""
    (folder / "adapter_config.json").write_text(text)
    peft.LoraConfig.from_pretrained(str(folder)).save_pretrained(str(folder))
    return json.loads((folder / "adapter_config.json").read_text())


def unordered(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields without the order that PEFT does not keep: it has sets of these two."""
    sets = ("target_modules", "exclude_modules")
    return {k: set(v) if k in sets and isinstance(v, list) else v for k, v in values.items()}


ROUND_TRIP = hypothesis.settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.filter_too_much, hypothesis.HealthCheck.too_slow],
)


@ROUND_TRIP
@hypothesis.given(chosen=fields())
def test_our_file_comes_back_from_peft(chosen, tmp_path_factory):
    ours = LoraConfig(**chosen)
    folder = tmp_path_factory.mktemp("config")
    read = peft.LoraConfig.from_pretrained(str(write(folder, ours.to_json())))
    assert unordered(ours.to_dict()) == read.to_dict()
    back = through_peft(folder, ours.to_json())
    assert unordered(back) == unordered(ours.to_dict())
    again = LoraConfig.from_dict(unordered(back))
    # PEFT's file is sorted throughout, so the order of patterns is lost there, not here.
    assert again == LoraConfig.from_dict(in_pefts_order(ours.to_dict()))


@ROUND_TRIP
@hypothesis.given(chosen=fields())
def test_pefts_file_comes_back_from_us(chosen, tmp_path_factory):
    theirs = peft.LoraConfig(**chosen)
    folder = tmp_path_factory.mktemp("config")
    theirs.save_pretrained(str(folder))
    ours = LoraConfig.from_json((folder / "adapter_config.json").read_text())
    write(folder, ours.to_json())
    again = peft.LoraConfig.from_pretrained(str(folder))
    assert again.to_dict() == theirs.to_dict()
    assert again == theirs


def write(folder, text: str):
    (folder / "adapter_config.json").write_text(text)
    return folder


def in_pefts_order(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: dict(sorted(v.items())) if isinstance(v, dict) else v
        for k, v in unordered(values).items()
    }


def test_every_field_is_drawn():
    from tests.config.test_config import CARRIED

    assert set(FIELDS) | {"peft_type"} == set(CARRIED)


SAMPLES = {
    **{name: [True] for name in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode")},
    "r": [3],
    "lora_alpha": [4],
    "lora_dropout": [0.5],
    "target_modules": ["a.*", ["q_proj"]],
    "exclude_modules": ["a.*", ["v_proj"]],
    "init_lora_weights": ["orthogonal", "pissa", False],
    "layers_to_transform": [0, [1]],
    "layers_pattern": ["h", ["h"]],
    "rank_pattern": [{"q_proj": 3}],
    "alpha_pattern": [{"q_proj": 3}],
    "target_parameters": [["up"]],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["score"]],
    "trainable_token_indices": [[1], {"score": [1]}],
    "ensure_weight_tying": [True, False],
    "task_type": ["SEQ_CLS"],
    **{name: ["x"] for name in ("base_model_name_or_path", "revision", "peft_version")},
    "auto_mapping": [{"a": "b"}],
}


def test_what_pefts_class_refuses_we_refuse():
    refused = []
    for pair in itertools.combinations(FIELDS, 2):
        for values in itertools.product(*(SAMPLES[name] for name in pair)):
            chosen = dict(zip(pair, values, strict=True))
            try:
                peft.LoraConfig(**chosen)
            except ValueError:
                refused.append(pair)
                assert not consistent(chosen), chosen
    assert ("target_modules", "layers_to_transform") in refused


def test_keys_of_other_features_at_their_defaults_are_fine():
    defaults = peft.LoraConfig().to_dict()
    assert LoraConfig.from_dict({**defaults, "ensure_weight_tying": None}) == LoraConfig(
        peft_version=peft.__version__
    )
    with pytest.raises(TypeError, match="unknown field 'lora_new'"):
        LoraConfig.from_dict({**defaults, "lora_new": None})
    with pytest.raises(NotImplementedError, match="use_qalora=True"):
        LoraConfig.from_dict({**defaults, "use_qalora": True})


def test_enums_of_peft_are_taken_as_their_values():
    theirs = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules=["v", "q"], r=4)
    expected = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q", "v"],
        r=4,
        peft_version=theirs.peft_version,
        ensure_weight_tying=False,
    )
    assert LoraConfig.from_dict(theirs.to_dict()) == expected


def test_orthogonal_rank_is_even_in_pefts_layers_too():
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="rank to be even, got 3"):
        peft.get_peft_model(
            net, peft.LoraConfig(r=3, init_lora_weights="orthogonal", target_modules=["0"])
        )
    LoraConfig(r=2, init_lora_weights="orthogonal", rank_pattern={"q": 4})


@pytest.mark.parametrize(
    "field", [{"lora_dropout": 0.5}, {"use_dora": True}, {"fan_in_fan_out": True}]
)
def test_pefts_parameter_layers_refuse_the_same_fields(field):
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    theirs = peft.LoraConfig(target_modules=[], target_parameters=["0.weight"], **field)
    with pytest.raises(ValueError, match=f"does not work with {next(iter(field))}"):
        peft.get_peft_model(net, theirs)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lookups_equal_those_of_a_peft_model(use_rslora):
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
