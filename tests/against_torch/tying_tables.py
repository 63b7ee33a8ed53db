"""PEFT's three tables on weight tying as data, and real PEFT run on a row of them.

The tables are those of the LoRA reference page of its documentation, section "Weight tying".
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

VOCABULARY, WIDTH, RANK = 48, 16, 2
EMBED, HEAD = "embed_tokens", "lm_head"
SAVE, TARGET, TOKENS = "modules_to_save", "target_modules", "trainable_token_indices"
_SHORT = {SAVE: "save", TARGET: "target", TOKENS: "tokens"}

# field, whether the model is tied, the flag, the field's values, what the documentation says.
DOCUMENTED: list[tuple[str, bool, bool, list[Any], str]] = [
    (SAVE, False, False, [[EMBED], [HEAD]], "Add `ModulesToSaveWrapper` on selected layer only"),
    (SAVE, False, True, [[EMBED], [HEAD]],
     "Warn, then add `ModulesToSaveWrapper` on selected layer only"),
    (SAVE, True, False, [[EMBED], [HEAD]], "Treat as separate"),
    (SAVE, True, True, [[EMBED], [HEAD]], "Wrap tied layers and keep wrappers tied"),
    (SAVE, False, False, [[EMBED, HEAD]], "Treat as separate"),
    (SAVE, False, True, [[EMBED, HEAD]], "Warn, then treat as separate"),
    (SAVE, True, False, [[EMBED, HEAD]], "Warn, then treat as separate"),
    (SAVE, True, True, [[EMBED, HEAD]], "Keep `ModulesToSaveWrapper`s tied"),
    (TARGET, False, False, [[EMBED], [HEAD]], "Add LoRA on selected layer only"),
    (TARGET, False, True, [[EMBED], [HEAD]], "Warn, then add LoRA on selected layer only"),
    (TARGET, True, False, [[EMBED], [HEAD]], "Treat as separate"),
    (TARGET, True, True, [[EMBED], [HEAD]], "Keep LoRA adapters tied"),
    (TARGET, False, False, [[EMBED, HEAD]], "Treat as separate"),
    (TARGET, False, True, [[EMBED, HEAD]], "Warn, then treat as separate"),
    (TARGET, True, False, [[EMBED, HEAD]], "Warn, then treat as separate"),
    (TARGET, True, True, [[EMBED, HEAD]], "Keep LoRA adapters tied"),
    (TOKENS, False, False, [[1, 2, 3]], "Trainable tokens on embeddings only"),
    (TOKENS, False, True, [[1, 2, 3]], "Warn, then trainable tokens on embeddings only"),
    (TOKENS, True, False, [[1, 2, 3]], "Tied trainable tokens"),
    (TOKENS, True, True, [[1, 2, 3]], "Tied trainable tokens"),
    (TOKENS, False, False, [{HEAD: [1, 2], EMBED: [1, 2]}], "Treat as separate"),
    (TOKENS, False, True, [{HEAD: [1, 2], EMBED: [1, 2]}], "Warn, then treat as separate"),
    (TOKENS, True, False, [{HEAD: [1, 2], EMBED: [1, 2]}], "Tied trainable tokens"),
    (TOKENS, True, True, [{HEAD: [1, 2], EMBED: [1, 2]}], "Tied trainable tokens"),
    (TOKENS, False, False, [{HEAD: [1, 2], EMBED: [3, 4]}], "Treat as separate"),
    (TOKENS, False, True, [{HEAD: [1, 2], EMBED: [3, 4]}], "Warn, then treat as separate"),
    (TOKENS, True, False, [{HEAD: [1, 2], EMBED: [3, 4]}], "Treat as separate"),
    (TOKENS, True, True, [{HEAD: [1, 2], EMBED: [3, 4]}], "Error"),
]  # fmt: skip

# What PEFT's warnings on weight tying say, by how they start.
WARNINGS = {
    "Model has `tie_word_embeddings=True` and a tied layer": "not ensured",
    "You have requested `ensure_weight_tying`, but no tied modules were found": "nothing tied",
    "You have requested `ensure_weight_tying`, but no tied modules are added": "no target tied",
    "ensure_weight_tying=True but the model does not have tied weights": "tokens not tied",
    "Unsupported layer type '<class 'peft.utils.other.ModulesToSaveWrapper'": "unsupported layer",
}
KINDS = {LoraLayer: "lora", ModulesToSaveWrapper: SAVE, TrainableTokensWrapper: "trainable_tokens"}
SEQ2SEQ = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the tables, for one value of the field.

    Attributes:
      field: the field of LoraConfig.
      tied: whether the model is.
      flag: `ensure_weight_tying`; None is no value of PEFT's.
      value: the field's value.
      says: what PEFT's documentation says.
    """

    field: str
    tied: bool
    flag: bool | None
    value: Any
    says: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that the row names."""
        if self.field == TOKENS and not isinstance(self.value, dict):
            return (EMBED,)  # a list is for the input embedding
        return tuple(self.value)

    @property
    def fields(self) -> dict[str, Any]:
        """The row as fields of either LoraConfig."""
        rest = {} if self.field == TARGET else {TARGET: ["q_proj"]}
        return {self.field: self.value, "ensure_weight_tying": self.flag, "r": RANK, **rest}

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        return f"{_SHORT[self.field]} {tied} {self.flag} {_short(self.value)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_short(tokens)}" for name, tokens in value.items())
    return "+".join(map(str, value))


ROWS = [Row(*row, value, says) for *row, values, says in DOCUMENTED for value in values]


@dataclasses.dataclass(frozen=True)
class Record:
    """What PEFT did.

    Attributes:
      kinds: for each adapted module, what it got; modules that are no table's are left out.
      storages: for each adapted module, a number: modules of the same number share memory.
      counted: their trainable parameters as PEFT counts them: each Parameter once.
      stored: the same, each memory once.
      warnings: those on weight tying, by `WARNINGS`.
      error: name of the exception's class; "" for none.
      unused: adapted modules whose adapter gets no gradient: the model never calls them.
      broken: name of the exception's class that the adapted model raises when called.
    """

    kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    storages: dict[str, int] = dataclasses.field(default_factory=dict)
    counted: int = 0
    stored: int = 0
    warnings: tuple[str, ...] = ()
    error: str = ""
    unused: tuple[str, ...] = ()
    broken: str = ""

    def line(self, *modules: str) -> str:
        """Returns it in one line, for tables of what PEFT does.

        For each of these modules: a letter, the same where memory is shared; "." where it is not
        adapted; "!" where the adapter is unused. Then parameters, counted / stored.
        """
        short = {name.removeprefix("model."): name for name in self.kinds}
        assert set(short) <= set(modules), short
        letters = [
            "." if m not in short
            else "abcd"[self.storages[short[m]]] + "!" * (short[m] in self.unused)
            for m in modules
        ]  # fmt: skip
        if self.error:
            return self.error
        broken = [f"called: {self.broken}"] if self.broken else []
        return " ".join([*letters, f"{self.counted}/{self.stored}", *broken])


def llama(tied: bool) -> Any:
    """Returns a tiny causal language model."""
    return transformers.LlamaForCausalLM(llama_config(tied))


def llama_config(tied: bool) -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=16,
        tie_word_embeddings=tied,
    )  # fmt: skip


def t5(tied: bool) -> Any:
    """Returns a tiny T5, whose four names of the table are one module and the head."""
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            tie_word_embeddings=tied, pad_token_id=0, decoder_start_token_id=0,
        )
    )  # fmt: skip


def bart(tied: bool) -> Any:
    """Returns a tiny BART, whose four names of the table are four modules."""
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_position_embeddings=16, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def run_peft(model: Any, **fields: Any) -> Record:
    """Returns what PEFT does with a model for these fields of its LoraConfig."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            # A copy: PEFT changes the list of modules_to_save that it is given.
            adapted = peft.get_peft_model(model, peft.LoraConfig(**copy.deepcopy(fields)))
        except (ValueError, TypeError) as error:
            return Record(warnings=_kinds_of(caught), error=type(error).__name__)
    modules = {
        name: (module, kind)
        for name, module in adapted.base_model.model.named_modules(remove_duplicate=False)
        for layer, kind in KINDS.items()
        if isinstance(module, layer) and name.endswith(("shared", EMBED, HEAD))
    }
    own = {name: _trainable(module) for name, (module, _) in modules.items()}
    storages: dict[frozenset[int], int] = {}
    numbers = {
        name: storages.setdefault(frozenset(map(_storage, found)), len(storages))
        for name, found in own.items()
    }
    every = [p for found in own.values() for p in found]
    used, broken = _used(adapted)
    return Record(
        kinds={name: kind for name, (_, kind) in modules.items()},
        storages=numbers,
        counted=sum(p.numel() for p in {id(p): p for p in every}.values()),
        stored=sum(p.numel() for p in {_storage(p): p for p in every}.values()),
        warnings=_kinds_of(caught),
        unused=tuple(
            n for n, found in own.items() if not broken and not used.intersection(map(id, found))
        ),
        broken=broken,
    )


def _trainable(module: Any) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad]


def _storage(parameter: Any) -> int:
    return parameter.untyped_storage().data_ptr()


def _kinds_of(caught: Iterable[Any]) -> tuple[str, ...]:
    """Names the warnings; one that is not on weight tying fails the test."""
    texts = [str(w.message) for w in caught]
    return tuple(next(k for start, k in WARNINGS.items() if t.startswith(start)) for t in texts)


def _used(model: Any) -> tuple[set[int], str]:
    """Returns the ids of the trainable parameters that the logits depend on, and an exception."""
    with torch.no_grad():
        for parameter in _trainable(model):
            torch.nn.init.normal_(parameter)  # no factor is zero
    ids = torch.arange(1, 9)[None]
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        logits = model(input_ids=ids, **both).logits
    except (RuntimeError, ValueError) as error:
        return set(), type(error).__name__
    if logits.requires_grad:
        logits.square().sum().backward()
    return {id(p) for p in _trainable(model) if p.grad is not None and bool(p.grad.any())}, ""
