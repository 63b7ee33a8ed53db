"""Masked language models, and those with a second head beside."""

from __future__ import annotations

from typing import Any

from tests.models.family import BERT, HEADS, LAYERS, LENGTH, PLAIN, VOCABULARY, WIDE, WIDTH, Family

_NARROW = {**PLAIN, "embedding_size": 16}
_ONE = {**PLAIN, "num_hidden_layers": 1}
_FULL = {**_ONE, "attention_type": "original_full"}
_PREDICTIONS = "cls/predictions/decoder"


def _bert(
    model: str, config: str, fields: Any, scope: str, head: str, kernels: int = 8, **more: Any
) -> Family:
    """Returns a class of a family built as BERT."""
    table = f"{scope}/embeddings/word_embeddings/embedding"
    return Family(model, (config, fields), table, BERT, kernels, head=head, **more)


_ALBERT = ("query", "key", "value", "attention/dense")

ENCODERS: dict[str, Family] = {
    "bert": _bert("FlaxBertForMaskedLM", "BertConfig", PLAIN, "bert", _PREDICTIONS),
    "bert_pretraining": _bert(
        "FlaxBertForPreTraining", "BertConfig", PLAIN, "bert", _PREDICTIONS, checkpoint=True,
        slow=True,
    ),
    "roberta": _bert(
        "FlaxRobertaForMaskedLM", "RobertaConfig", PLAIN, "roberta", "lm_head/decoder",
        checkpoint=True, slow=True,
    ),
    "xlm_roberta": _bert(
        "FlaxXLMRobertaForMaskedLM", "XLMRobertaConfig", _ONE, "roberta", "lm_head/decoder", 4,
        checkpoint=True, slow=True,
    ),
    "roberta_prelayernorm": _bert(
        "FlaxRobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", _ONE,
        "roberta_prelayernorm", "lm_head/decoder", 4, checkpoint=True, slow=True,
    ),
    "big_bird": _bert(
        "FlaxBigBirdForMaskedLM", "BigBirdConfig", _FULL, "bert", _PREDICTIONS, 4, checkpoint=True,
        slow=True,
    ),
    "big_bird_sparse": _bert(
        "FlaxBigBirdForMaskedLM",
        "BigBirdConfig",
        {**_ONE, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1,
         "max_position_embeddings": 24},
        "bert",
        _PREDICTIONS,
        4,
        length=24,
    ),
    "big_bird_pretraining": _bert(
        "FlaxBigBirdForPreTraining", "BigBirdConfig", _FULL, "bert", _PREDICTIONS, 4, slow=True
    ),
    "albert": Family(  # One layer, applied twice.
        "FlaxAlbertForMaskedLM",
        ("AlbertConfig", _NARROW),
        "albert/embeddings/word_embeddings/embedding",
        _ALBERT,
        4,
        head="predictions/decoder",
    ),
    "albert_pretraining": Family(
        "FlaxAlbertForPreTraining",
        ("AlbertConfig", _NARROW),
        "albert/embeddings/word_embeddings/embedding",
        _ALBERT,
        4,
        slow=True,
        head="predictions/decoder",
    ),
    "electra": _bert(
        "FlaxElectraForMaskedLM", "ElectraConfig", _NARROW, "electra", "generator_lm_head",
        checkpoint=True,
    ),
    "distilbert": Family(
        "FlaxDistilBertForMaskedLM",
        (
            "DistilBertConfig",
            {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS,
             "hidden_dim": WIDE, "max_position_embeddings": LENGTH},
        ),
        "distilbert/embeddings/word_embeddings/embedding",
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        8,
        head="vocab_projector",
    ),
    "roformer": _bert(
        "FlaxRoFormerForMaskedLM", "RoFormerConfig", _ONE, "roformer", _PREDICTIONS, 4
    ),
}  # fmt: skip
