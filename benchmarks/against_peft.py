"""PEFT in PyTorch against this library: the same weights, adapters, tokens, cores and dtype.

GPT-2 small with random weights and SmolLM2-135M with its own, a low-rank delta on the tied table
and on attention, AdamW on both sides. PEFT runs as its documentation has it, in eager PyTorch. With
``ensure_weight_tying=True`` its optimizer steps the memory of the tied factors twice; it is left
as it is, so that only the first losses are equal.

python benchmarks/against_peft.py                              2 x 128 tokens
python benchmarks/against_peft.py --batch 4 --length 256
GLIBC_TUNABLES=... python benchmarks/against_peft.py           `_harness.KEPT_MEMORY`

In the last both keep their memory from step to step: on the CPU each step of either asks the system
for its temporary arrays anew, and every page of them is cleared when it is first written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import _harness
import _models
import corpus
import generation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import smollm2
import torch
import transformers

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of, to_state_dict
from flax_tied_lora.peft import load_adapter

# PEFT knows by the name lm_head, not by wte, that an embedding is targeted.
GPT2_TARGETS = ["wte", "lm_head", "c_attn"]
LLAMA_TARGETS = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"]
TITLES = {"gpt2": "GPT-2 small", "smollm2": "SmolLM2-135M"}
RANK, ALPHA, RATE, DECAY = 8, 16, 1e-3, 0.01


@dataclasses.dataclass
class Model:
    flax: Any
    params: Any
    torch: Any  # its class in PyTorch
    table: Callable[[Any], jax.Array]  # of params
    targets: list[str]
    rows: np.ndarray  # [batch, length + 1]
    ties: Any = "auto"


def gpt2(batch: int, length: int, tiny: bool) -> Model:
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 256, "n_positions": 32}
    none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
    config = transformers.GPT2Config(**none, **(small if tiny else {}))
    flax = transformers.FlaxGPT2LMHeadModel(config, _do_init=False)
    params = jax.jit(flax.init_weights, static_argnums=1)(jax.random.key(0), (1, 8))
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1))
    table = lambda params: params["transformer"]["wte"]["embedding"]  # noqa: E731
    return Model(flax, params, transformers.GPT2LMHeadModel, table, GPT2_TARGETS, rows)


def smollm2_135m(batch: int, length: int, tiny: bool) -> Model:
    shape = batch, length + 1
    if tiny:
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        )  # fmt: skip
        flax = smollm2.FlaxLlama(config, _do_init=False)
        params = jax.jit(flax.init_weights, static_argnums=1)(jax.random.key(0), (1, 8))
        head = params["lm_head"]["kernel"]
        params["lm_head"]["kernel"] = jax.ShapeDtypeStruct(head.shape, head.dtype)
        rows = np.arange(math.prod(shape)).reshape(shape) % config.vocab_size
    else:
        flax, params, tokenizer = smollm2.load(context=length)
        text = corpus.documentation_text()[: 16 * math.prod(shape)]
        rows = generation.encode(tokenizer, text)[: math.prod(shape)].reshape(shape)
    flax.config.use_cache = False
    table = lambda params: params["model"]["embed_tokens"]["embedding"]  # noqa: E731
    cls, ties = transformers.LlamaForCausalLM, smollm2.TIES
    return Model(flax, params, cls, table, LLAMA_TARGETS, rows, ties)


def in_peft(m: Model) -> Any:
    """Returns the model in PyTorch with the same weights, under PEFT."""
    model = m.torch(m.flax.config)
    whole = tied_lora.LoraConfig(r=RANK, target_modules=m.targets[:1])
    params = tied_lora.base(tied_lora.wrap(m.params, whole, ties=m.ties))
    state = to_state_dict(params, names_of(m.flax.config))
    left, odd = model.load_state_dict(
        {n: torch.from_numpy(np.array(x)) for n, x in state.items()}, strict=False
    )
    if odd or set(left) - {"lm_head.weight"}:
        raise SystemExit(f"weights that PyTorch's model lacks: {odd}, or that it misses: {left}")
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=m.targets, ensure_weight_tying=True,
        fan_in_fan_out=m.torch is transformers.GPT2LMHeadModel,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of merging tied weights
        tuned = peft.get_peft_model(model, lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, factor in tuned.named_parameters():
            if "lora" in name:
                factor.normal_(std=0.02)
    return tuned.train()


def peft_step(tuned: Any, rows: np.ndarray) -> Callable[[], float]:
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    tokens = torch.from_numpy(rows).long()

    def step() -> float:
        optimizer.zero_grad()
        logits = tuned(input_ids=tokens[:, :-1]).logits
        labels = tokens[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def call(m: Model, params: Any, tokens: jax.Array, **options: Any) -> Any:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    args = {"params": params}, tokens, jnp.ones_like(tokens), positions
    return m.flax.module.apply(*args, return_dict=False, **options)


def flax_steps(m: Model, adapted: tied_lora.Adapted) -> dict[str, _models.Step]:
    def plain(params: Any, rows: jax.Array) -> jax.Array:
        logits = call(m, params, rows[:, :-1])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    def fused(params: Any, rows: jax.Array) -> jax.Array:
        # The logits are not used, so the compiler drops them.
        hidden = call(m, params, rows[:, :-1], output_hidden_states=True)[1][-1]
        return tied_lora.losses.linear_cross_entropy(hidden, m.table(params), rows[:, 1:])

    rows = jnp.asarray(m.rows, jnp.int32)
    names = {"ours": plain, "ours, linear_cross_entropy": fused}
    return {n: _models.adapted_step(loss, adapted, rows) for n, loss in names.items()}


def measured(m: Model, rounds: int) -> dict[str, Any]:
    tuned = in_peft(m)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder, save_embedding_layers=False)
        names = names_of(m.flax.config)
        shape = jax.ShapeDtypeStruct((2, 16), np.int32)
        sites = tied_lora.trace(functools.partial(call, m), m.params, shape)
        adapted = load_adapter(folder, m.params, names, ties=m.ties, sites=sites)
    steps = flax_steps(m, adapted)
    cases = {"PEFT": peft_step(tuned, m.rows), **steps}
    first = {name: float(case()) for name, case in cases.items()}
    _harness.check_equal(first)
    for case in cases.values():
        case()
    seconds = _harness.interleaved(cases, rounds)
    return {
        "first losses": first,
        "median seconds": _harness.medians(seconds),
        **_harness.costs({name: step.compiled for name, step in steps.items()}),
        "ratios": {f"PEFT / {name}": _harness.ratio(seconds, "PEFT", name) for name in steps},
    }


def main() -> None:
    made = {"gpt2": gpt2, "smollm2": smollm2_135m}
    parser = _harness.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=made, default=[*made])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    args = parser.parse_args()
    if jax.default_backend() != "cpu":
        raise SystemExit("PyTorch's half runs on the CPU: set JAX_PLATFORMS=cpu for this one, too")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(_harness.cores())
    batch, length = args.batch or 2, args.length or (16 if args.tiny else 128)
    figures = {
        f"{TITLES[m]}, {batch} x {length} tokens": measured(
            made[m](batch, length, args.tiny), args.rounds
        )
        for m in args.models
    }
    given = {f: getattr(args, f) for f in ("batch", "length") if getattr(args, f)}
    suffix = "".join(f"-{field}{value}" for field, value in given.items())
    what = f"one training step, float32, rank {RANK}, tied table and attention, AdamW"
    record = {"what": what, "rounds": args.rounds, **figures}
    _harness.store(f"against_peft{suffix}", record)


if __name__ == "__main__":
    main()
