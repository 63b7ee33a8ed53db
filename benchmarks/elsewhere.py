"""What other libraries do with a LoRA on a tied embedding: shows those that are installed.

pip install peft==0.21.2 torch==2.13.0        (the extra `bench` has them)
pip install qwix==0.1.8 quax==0.4.6           (their pins may want an environment of their own)
"""

from __future__ import annotations

import importlib.util
import warnings
from importlib import metadata

import _harness

WIDTH, ROWS, RANK = 16, 64, 4


def peft() -> str:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=ROWS, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    before = model.model.embed_tokens.weight.detach().clone()
    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["embed_tokens"], ensure_weight_tying=True
    )
    tuned = get_peft_model(model, lora)
    factors = [p for name, p in tuned.named_parameters() if "lora" in name]
    with torch.no_grad():
        for factor in factors:
            factor.normal_()
    layer = tuned.base_model.model.model.embed_tokens
    delta = layer.get_delta_weight("default").detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merging tied weights may not be what one wants
        merged = tuned.merge_and_unload().model.embed_tokens.weight.detach()
    times = ((merged - before) / delta).median().item()
    storages = len({p.data_ptr() for p in factors})
    return (
        f"{len(factors)} trainable Parameters over {storages} storages; merged: "
        f"W + {times:.2f} * delta"
    )


def qwix() -> str:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import qwix

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(ROWS, WIDTH, name="embed_tokens")
            return embed.attend(nn.Dense(WIDTH, name="dense")(embed(tokens)))

    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=RANK)
    model = qwix.apply_lora_to_model(Model(), provider)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = model.init(jax.random.key(0), jnp.arange(8))["params"]
    said = [str(w.message) for w in caught if "embed" in str(w.message).lower()]
    return f"embed_tokens has {sorted(params['embed_tokens'])}; warnings about it: {said}"


def quax() -> str:
    import jax
    import jax.numpy as jnp
    import quax
    from quax.examples import lora

    table = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))
    weight = lora.LoraArray(
        table, rank=RANK, scale=1.0, key=jax.random.key(1), allow_materialise=False
    )
    found = []
    for name, use in {
        "lookup": lambda w: w[jnp.arange(8)],
        "tied projection": lambda w: jnp.ones((8, WIDTH)) @ w.T,
    }.items():
        try:
            quax.quaxify(use)(weight)
            found.append(f"{name}: served")
        except RuntimeError as error:
            found.append(f"{name}: {error}")
    return "; ".join(found)


MISSING = {
    "peft": "not installed",
    "qwix": "not installed",
    "quax": "not installed; quax 0.4.6's LoRA adds W + delta up to a whole table at both uses, or "
    "refuses, so that its time would be that of the densified step",
}


def main() -> None:
    _harness.parser(__doc__, rounds=None).parse_args()
    found = {"what": "a LoRA on a tied embedding in other libraries"}
    for show in (peft, qwix, quax):
        name = show.__name__
        if importlib.util.find_spec(name) is None:
            found[name] = MISSING[name]
        else:
            found[f"{name} {metadata.version(name)}"] = show()
    _harness.store("elsewhere", found)


if __name__ == "__main__":
    main()
