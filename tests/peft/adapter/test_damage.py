"""Damaged adapters of a tiny model: each loads, or ends in the one error, and nothing changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_tied_lora.peft import AdapterFileError
from tests.helpers import damage_shards
from tests.helpers.damage import CONFIG, WEIGHTS, put, snapshot
from tests.helpers.damage_cases import CASES
from tests.helpers.damaged_model import HEAD, PARAMS, PREFIX, TABLE, WIDTH, Q, load, make

assert damage_shards.CASES is CASES  # importing it has added its own


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    return make(tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def adapter(files, tmp_path) -> Path:
    put(files, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_adapter_is_of_every_kind(adapter):
    names = set(load_file(adapter / WEIGHTS))
    assert names == {
        f"{TABLE}.lora_embedding_A", f"{TABLE}.lora_embedding_B",
        f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight",
        f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{Q}.base_layer.bias",
        *(n.replace(".0.", ".1.") for n in
          (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{Q}.base_layer.bias")),
        f"{PREFIX}norm.weight",
    }  # fmt: skip
    adapted = load(adapter)
    assert set(adapted.adapters) == {"lora", "bias", "modules_to_save"}
    assert set(adapted.adapters["lora"]) == {
        "embed/embedding", "block_0/q/kernel", "block_1/q/kernel",
    }  # fmt: skip


def fails(directory: Path, message: str, **options: Any) -> None:
    """Fails unless loading ends in the one error, which says this, and changes nothing."""
    before = snapshot(directory) if directory.is_dir() else None
    params = jax.tree.map(np.copy, PARAMS)
    with pytest.raises(AdapterFileError, match=message) as caught:
        load(directory, **options)
    text = str(caught.value)
    assert str(directory) in text
    assert "expected" in text
    assert len(text) < 1000
    text.encode("utf-8")
    assert (snapshot(directory) if directory.is_dir() else None) == before
    jax.tree.map(np.testing.assert_array_equal, PARAMS, params)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files_that_are_none(adapter, case):
    case.do(adapter)
    fails(adapter, case.message)


def _tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        changed = change(tensors)
        tensors = tensors if changed is None else changed
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return do


def _fields(**fields: Any) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text()) | fields
        (directory / CONFIG).write_text(json.dumps(config))

    return do


def _without(*ends: str) -> Callable[[Path], None]:
    return _tensors(lambda t: {n: x for n, x in t.items() if not n.endswith(ends)})


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    return _tensors(lambda t: {n.replace(old, new): x for n, x in t.items()})


def _put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return _tensors(lambda t: t.update({name: np.array(change(t[name]), order="C")}))


def _add(name: str, *shape: int) -> Callable[[Path], None]:
    return _tensors(lambda t: t.update({name: np.ones(shape, np.float32)}))


_A, _B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
# What is wrong with an adapter whose files are sound, and what the error says of it.
CONTENTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no_b": (_without("0.q_proj.lora_B.weight"), re.escape(f"found no {_B} (1 missing)")),
    "no_a": (_without("0.q_proj.lora_A.weight"), re.escape(f"found no {_A} (1 missing)")),
    "no_b_at_all": (_without("q_proj.lora_B.weight"), r"found no .*\(2 missing\)"),
    "half_of_a_table": (_without("lora_embedding_B"), "found no .*lora_embedding_B"),
    "half_of_a_tied_copy": (_without("lm_head.lora_B.weight"), "found no .*lm_head.lora_B.weight"),
    "no_tensors": (_tensors(lambda t: t.clear()), "found no tensors; expected an adapter"),
    "no_such_names": (_tensors(lambda t: {"x": t[_A]}), "found a tensor 'x'; expected names that"),
    "a_transposed": (_put(_A, lambda x: x.T), rf"{_A} is \[4, 2\]; expected \[2, 4\]"),
    "b_transposed": (_put(_B, lambda x: x.T), rf"{_B} is \[2, 6\]; expected \[6, 2\]"),
    "a_of_another_rank": (_put(_A, lambda x: x[:1]), r"is \[1, 4\]; expected \[2, 4\]"),
    "a_of_another_model": (_put(_A, lambda x: x[:, :3]), r"is \[2, 3\]; expected \[2, 4\]"),
    "a_with_more_axes": (_put(_A, lambda x: x[None]), r"is \[1, 2, 4\]; expected \[2, 4\]"),
    "a_with_no_axes": (_put(_A, lambda x: x[0, 0]), r"is \[\]; expected \[2, 4\]"),
    "a_of_integers": (_put(_A, lambda x: x.astype(np.int32)), "is int32; expected floating"),
    "a_of_truths": (_put(_A, lambda x: x > 0), "is bool; expected floating"),
    "a_quantised": (_put(_A, lambda x: x.astype(np.uint8)), "is uint8; expected floating"),
    "a_complex": (_put(_A, lambda x: x.astype(np.complex64)), "dtype 'C64'; expected one of BOOL"),
    "a_nan": (
        _put(_A, lambda x: x * np.nan),
        rf"{_A} .*has NaN or infinite values; expected finite",
    ),
    "b_infinite": (
        _put(_B, lambda x: x * np.inf),
        rf"{_B} .*has NaN or infinite values; expected finite",
    ),
    "copies_that_differ": (
        _put(f"{HEAD}.lora_A.weight", lambda x: x + 1),
        r"lm_head.lora_A.weight differs from .*embed_tokens.lora_embedding_B.*tied_copies=.apart",
    ),
    "bias_of_another_shape": (_put(f"{Q}.base_layer.bias", lambda x: x[:2]), r"is \[2\]; expected"),
    "saved_of_another_shape": (_put(f"{PREFIX}norm.weight", lambda x: x[:2]), r"\[2\]; expected"),
    "no_prefix": (_renamed(PREFIX, ""), "expected names that start with 'base_model.model.'"),
    "prefix_twice": (_renamed(PREFIX, PREFIX * 2), "has no Flax leaf in the table.*names_of"),
    "unknown_module": (_renamed("0.q_proj", "0.w_proj"), "'layers.0.w_proj.weight' has no Flax"),
    "unknown_layer": (_renamed("layers.1", "layers.9"), "'block_9/q/.*which the params do not"),
    "unknown_tensor": (_add(f"{Q}.lora_C.weight", 2), "'layers.0.q_proj.lora_C.weight' has no"),
    "adapter_s_name_in_it": (_renamed("lora_A", "lora_A.default"), "lora_A.default.*has no Flax"),
    "magnitude_without_dora": (_add(f"{Q}.lora_magnitude_vector", 6), "which the config makes no"),
    "tokens_without_field": (
        _add(f"{TABLE}.token_adapter.trainable_tokens_delta", 1, WIDTH),
        "trainable_token_indices",
    ),
    "bias_without_field": (_fields(bias="none"), "q_proj.base_layer.bias.*bias='none'"),
    "bias_not_adapted": (
        _renamed("1.q_proj.base_layer.bias", "1.q_proj.bias"),
        r"found no .*1.q_proj.base_layer.bias",
    ),
    "saved_without_field": (
        _fields(modules_to_save=None),
        "norm.weight, and the config has .*modules_to_save=None",
    ),
    "another_rank": (_fields(r=3), r"is \[2, 7\]; expected \[3, 7\]"),
    "rank_of_one_module": (_fields(rank_pattern={"q_proj": 1}), r"expected \[1, 4\]"),
    "rank_of_one_copy": (_fields(rank_pattern={"lm_head": 1}), "different (ranks|values)"),
    "alpha_of_one_copy": (_fields(alpha_pattern={"lm_head": 1}), "different (ranks|values)"),
    "rank_above_the_matrix": (_fields(r=40), r"is \[2, 7\]; expected \[40, 7\]"),
    "rank_0": (_fields(r=0), f"{CONFIG}: LoraConfig: r=0 .*expected an int above 0"),
    "rank_text": (_fields(r="8"), f"{CONFIG}: LoraConfig: r='8'"),
    "alpha_negative": (_fields(lora_alpha=-1), f"{CONFIG}: LoraConfig: lora_alpha=-1"),
    "dropout_one": (_fields(lora_dropout=1.0), f"{CONFIG}: LoraConfig: lora_dropout"),
    "bias_unknown": (_fields(bias="some"), f"{CONFIG}: LoraConfig: bias='some'"),
    "init_unknown": (_fields(init_lora_weights="zeros"), f"{CONFIG}: LoraConfig: init_lora"),
    "init_not_carried_out": (_fields(init_lora_weights="eva"), f"{CONFIG}: .*'eva' is not carried"),
    "field_unknown": (_fields(use_nora=True), f"{CONFIG}: .*unknown field 'use_nora'.*use_dora"),
    "qalora": (_fields(use_qalora=True), f"{CONFIG}: .*use_qalora=True is not carried out"),
    "lora_bias": (_fields(lora_bias=True), f"{CONFIG}: .*lora_bias=True is not carried out"),
    "regex_broken": (_fields(target_modules="q_(proj"), f"{CONFIG}: .*target_modules"),
    "replication": (_fields(layer_replication=[[0, 2]]), f"{CONFIG}: .*layer_replication"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_do_not_fit(adapter, name):
    do, message = CONTENTS[name]
    do(adapter)
    fails(adapter, message)


def test_dora_without_its_magnitudes(adapter):
    _tensors(lambda t: {n: x for n, x in t.items() if "q_proj.lora" in n})(adapter)
    _fields(use_dora=True, bias="none", modules_to_save=None, ensure_weight_tying=False)(adapter)
    fails(adapter, "found no .*q_proj.lora_magnitude_vector")
