"""Model families of transformers' Flax classes, tiny, with small random weights.

Nothing is downloaded: each model is built from a config, and its weights are drawn here rather
than by the class, whose deviation of 0.02 leaves attention all but uniform and biases at zero.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.models.decoders import DECODERS
from tests.models.encoders import ENCODERS
from tests.models.family import VOCABULARY, WIDTH, Family
from tests.models.seq2seq import SEQ2SEQ

__all__ = ["FAMILIES", "LABELS", "TOKENS", "VOCABULARY", "WIDTH", "Case", "Family", "build"]

FAMILIES: dict[str, Family] = {**DECODERS, **ENCODERS, **SEQ2SEQ}
TOKENS = np.random.default_rng(0).integers(4, VOCABULARY, (2, 7)).astype(np.int32)
LABELS = np.random.default_rng(1).integers(4, VOCABULARY, (2, 7)).astype(np.int32)
_RNG = np.random.default_rng(2)
_ENCODED = {
    "features": _RNG.standard_normal((2, 8, 12)).astype(np.float32),
    "pixels": _RNG.standard_normal((2, 3, 8, 8)).astype(np.float32),
    "waves": _RNG.standard_normal((2, 160)).astype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of a family with its weights."""

    family: Family
    model: Any
    params: Any

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of the length that the model takes."""
        return np.resize(TOKENS, (2, self.family.length))

    @property
    def labels(self) -> np.ndarray:
        return np.resize(LABELS, (2, self.family.length))

    def encoded(self, tokens: Any) -> Any:
        """Returns what goes into the model first: tokens, or what else its encoder reads."""
        return _ENCODED.get(self.family.encoder, tokens)

    @property
    def ties(self) -> Any:
        """What `wrap` is told about ties: the model's own config, unless that says otherwise."""
        family = self.family
        declared = family.declared_untied and family.untied_head
        return family.ties if declared else self.model.config

    def call(self, params: Any, tokens: Any) -> Any:
        """Returns logits of the model, called as people call it."""
        decoder = {"decoder_input_ids": tokens[:, ::-1]} if self.family.encodes else {}
        mode, value = self.family.mode
        first = self.encoded(tokens)
        output = self.model(first, params=params, **decoder, **{mode: value})
        return output["prediction_logits" if "prediction_logits" in output else "logits"]

    def generate(self, params: Any, tokens: Any, **settings: Any) -> Any:
        """Returns the tokens that the model's own ``generate`` makes."""
        settings = {"max_new_tokens": 4, "do_sample": False, **settings}
        settings |= {"pad_token_id": 0, "eos_token_id": 3}
        return self.model.generate(self.encoded(tokens), params=params, **settings).sequences


@functools.cache
def build(name: str, dtype: Any = jnp.float32) -> Case:
    """Returns a family's model that computes in ``dtype``; its weights are float32."""
    family = FAMILIES[name]
    made = functools.partial(getattr(transformers, family.model), config_of(*family.config))
    if family.of_two:  # These draw weights, and take long over it: drawn as shapes alone.
        models: list[Any] = []
        jax.eval_shape(lambda: models.append(made(dtype=dtype)))
        model = models[0]
    else:
        model = made(dtype=dtype, _do_init=False)
    if family.checkpoint:
        model.enable_gradient_checkpointing()
    return Case(family, model, random_weights(model.params_shape_tree))


def config_of(kind: str, fields: Mapping[str, Any]) -> Any:
    """Returns a config of transformers, or of a model of two, whose fields are configs."""
    made = getattr(transformers, kind)
    parts = {k: config_of(*v) for k, v in fields.items() if k in ("encoder", "decoder")}
    if parts:
        config = made.from_encoder_decoder_configs(parts["encoder"], parts["decoder"])
        config.decoder_start_token_id, config.pad_token_id = 7, 0
        return config
    return made(**fields)


def random_weights(shapes: Any) -> Any:
    """Returns arrays of these shapes: scales around one, all else around zero, deviation 0.15."""
    rng = np.random.default_rng(7)

    def draw(path: Any, leaf: Any) -> jax.Array:
        around = 1.0 if len(leaf.shape) == 1 and path[-1].key in ("scale", "weight") else 0.0
        return jnp.asarray(around + 0.15 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.tree.map(lambda x: x, dict(shapes)))


@pytest.fixture(scope="module", autouse=True)
def clip_of_old_jax():
    """Gives ``jnp.clip`` its old names ``a_min`` and ``a_max``, by which Flax T5 calls it."""
    clip = jnp.clip

    def with_old_names(x: Any, *bounds: Any, a_min: Any = None, a_max: Any = None) -> Any:
        return clip(x, *bounds) if bounds else clip(x, min=a_min, max=a_max)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "clip", with_old_names)
        yield
