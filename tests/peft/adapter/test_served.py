"""What other programs would not serve as it was trained is refused by name, or warned of."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from flax_tied_lora import arithmetic
from flax_tied_lora.peft import AdapterFileError, ServingWarning, save_adapter
from tests.peft.adapter.test_plain_form import ATTENTION, NAMES, PARAMS, adapter

PAGE = Path(__file__).parents[3] / "docs/serving-elsewhere.md"
WRONG = {  # what a well-known server serves wrongly, and what the warning says of it
    "use_rslora": ({"use_rslora": True}, r"use_rslora: SGLang .* wrongly, llama.cpp .*plain=True"),
    "alpha_pattern": ({"alpha_pattern": {"o_proj": 9}}, r"alpha_pattern: SGLang .*plain=True"),
    "start": ({"init_lora_weights": "pissa"}, r"started from the weight.*arithmetic\.plain"),
    "dora": ({"use_dora": True}, r"use_dora: SGLang .* drops it.*save_merged"),
    "copies": ({"modules_to_save": ["norm"]}, r"modules_to_save.*drops it.*save_merged"),
    "tokens": ({"trainable_token_indices": [3]}, r"trained tokens.*SGLang .* drops it.*plain=True"),
}
REFUSED = {  # by the reader that it is for
    ("vllm", "dora"): ({"use_dora": True}, r"use_dora: vLLM 0\.32\.0 refuses it; save_merged"),
    ("vllm", "tokens"): ({"trainable_token_indices": [3]}, "vLLM .* refuses it; plain=True"),
    ("sglang", "regex"): ({"target_modules": r".*\.q_proj|.*\.[kv]_proj"}, "regex: SGLang"),
    ("sglang", "partner"): ({"target_modules": ["q_proj"]}, "modules that servers fuse: SGLang"),
    ("sglang", "rank_pattern"): ({"rank_pattern": {"o_proj": 1}}, "rank_pattern: SGLang"),
    ("llama.cpp", "table"): ({"target_modules": ["embed_tokens"]}, "llama.cpp .*save_merged"),
    ("tensorrt-llm", "biases"): ({"use_rslora": True}, "TensorRT-LLM .* was not looked at with it"),
    ("mlx", "projections"): ({}, "factors of projections: MLX-LM .* refuses it"),
}


def attention(**fields):
    return adapter(**{"target_modules": ATTENTION, **fields})


@pytest.mark.parametrize("kind", WRONG)
def test_what_a_server_serves_wrongly_is_warned_of(tmp_path, kind):
    fields, message = WRONG[kind]
    with pytest.warns(ServingWarning, match=message):
        save_adapter(tmp_path / "a", attention(**fields), NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(tmp_path / "b", attention(**fields), NAMES, for_="peft")


def test_what_all_serve_is_saved_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(tmp_path / "a", attention(), NAMES)
        save_adapter(tmp_path / "b", attention(), NAMES, for_=["vllm", "sglang", "llama.cpp"])
        for i, fields in enumerate(({"use_rslora": True}, {"alpha_pattern": {"o_proj": 9}})):
            save_adapter(tmp_path / f"c{i}", attention(**fields), NAMES, plain=True, for_="sglang")
        tied = adapter(target_modules=["embed_tokens", "q_proj"], use_rslora=True)
        save_adapter(tmp_path / "d", tied, NAMES, plain=True, for_=("vllm", "sglang"))
        started = arithmetic.plain(attention(init_lora_weights="pissa"), PARAMS)
        save_adapter(tmp_path / "e", started, NAMES, plain=True, for_="vllm")


@pytest.mark.parametrize("case", REFUSED, ids=":".join)
def test_what_the_named_reader_does_not_serve_is_refused(tmp_path, case):
    fields, message = REFUSED[case]
    with pytest.raises(AdapterFileError, match=rf"for_=\['{case[0]}'\]: .*{message}"):
        save_adapter(tmp_path / "a", attention(**fields), NAMES, for_=case[0])
    assert not (tmp_path / "a").exists()


def test_trained_tokens_in_plain_form_are_a_table(tmp_path):
    adapted = attention(trainable_token_indices=[3, 5])
    save_adapter(tmp_path / "a", adapted, NAMES, plain=True, for_="vllm")
    with pytest.raises(AdapterFileError, match="an embedding or of the output projection: llama"):
        save_adapter(tmp_path / "b", adapted, NAMES, plain=True, for_="llama.cpp")


def test_an_unknown_reader(tmp_path):
    with pytest.raises(ValueError, match="for_='vLLM'; expected of 'peft', 'vllm', 'sglang'"):
        save_adapter(tmp_path / "a", attention(), NAMES, for_="vLLM")
