"""What inputs are made bad from: params, sites and adapters of a tied model, and odd boxes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

import flax_tied_lora as tied_lora
from flax_tied_lora import CallSite, CallSites, LoraConfig

EMBED, HEAD, UP = "embed_tokens/embedding", "lm_head/kernel", "up/kernel"


def config(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": list(targets) or None, **options})


def twice(params: Any) -> Any:
    return jnp.sin(jnp.ones((3, 8)) @ params["up"]["kernel"] @ params["up"]["kernel"]).sum()


class Inputs:
    """What the cases are tried on."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)

        def array(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), dtype)

        self.params = {
            "embed_tokens": {"embedding": array(12, 8)},
            "up": {"kernel": array(8, 8), "bias": array(8)},
            "down": {"kernel": array(8, 8)},
            "q_proj": {"kernel": array(8, 2, 4)},
            "norm": {"scale": array(8)},
            "counts": {"table": jnp.ones((4, 4), jnp.int32)},
            "half": {"kernel": array(12, 8, dtype=jnp.bfloat16)},
            "lm_head": {"kernel": array(8, 12)},
        }
        self.config = config("embed_tokens", "up", lora_dropout=0.5)
        self.adapted = tied_lora.wrap(self.params, self.config, ties=[(EMBED, HEAD)])
        self.other = tied_lora.wrap(self.params, config("embed_tokens"))
        self.stacked = tied_lora.stack([self.adapted, self.adapted])
        self.sites = CallSites((CallSite(UP, "dot_general", 0, "", "projection", (0,), (1,)),))

    def find(self, *ties: Any, params: Any = None) -> Any:
        return tied_lora.find_ties(params or self.params, list(ties))

    def wrap(self, *targets: str, params: Any = None, **options: Any) -> Any:
        wraps = {k: options.pop(k) for k in ("sites", "ties", "rng") if k in options}
        return tied_lora.wrap(params or self.params, config(*targets, **options), **wraps)

    def snapshot(self) -> list[Any]:
        leaves, treedef = jax.tree.flatten(
            (self.params, self.adapted, self.other, self.stacked, self.sites, self.config)
        )
        values = [np.asarray(x).tobytes() if isinstance(x, jax.Array) else repr(x) for x in leaves]
        return [treedef, [id(x) for x in leaves], values]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box(meta.AxisMetadata):
    """A box that has no names for axes."""

    value: Any

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> Box:
        return Box(value)

    def add_axis(self, index: int, params: Any) -> Box:
        return self

    def remove_axis(self, index: int, params: Any) -> Box:
        return self


@dataclasses.dataclass
class Hidden:
    array: Any


def site(leaf: str, rows: Any, cols: Any, operation: str = "dot_general") -> CallSites:
    return CallSites((CallSite(leaf, operation, role="projection", rows=rows, cols=cols),))


def broken_variables(adapted: Any, **changes: Any) -> Any:
    variables = {**adapted.variables(), **changes}
    return tied_lora.Adapted.from_variables(
        {k: v for k, v in variables.items() if v is not None}, adapted.plan
    )


def lora(adapted: Any, key: str, **factors: Any) -> Any:
    groups = dict(adapted.adapters["lora"])
    groups[key] = {k: v for k, v in {**groups[key], **factors}.items() if v is not None}
    return {"lora": groups}
