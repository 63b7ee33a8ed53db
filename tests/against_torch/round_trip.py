"""Models of transformers' families in both libraries, and adapters carried between them."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of, to_state_dict
from flax_tied_lora.peft import load_adapter, save_adapter
from tests.against_torch.test_names_torch import config_of
from tests.helpers.damage import CONFIG, WEIGHTS
from tests.models.families import FAMILIES, LABELS, TOKENS, Family, random_weights


class Model:
    """A family's model with the same random weights in Flax and in PyTorch."""

    def __init__(self, name: str):
        self.family = FAMILIES[name]
        self.config = config_of(name)
        self.flax = getattr(transformers, self.family.model)(self.config, _do_init=False)
        self.params = random_weights(self.flax.params_shape_tree)
        self.names = names_of(self.config)
        self.sites = tied_lora.trace(self.logits, self.params)
        if self.family.untied_head:  # A leaf of the Flax class alone: what it holds is the table.
            table = self.params["model"]["embed_tokens"]["embedding"]
            self.params["lm_head"]["kernel"] = table.T
        self.state = {
            n: torch.from_numpy(np.array(x))
            for n, x in to_state_dict(self.params, self.names, duplicates=True).items()
        }

    @functools.cached_property
    def base(self) -> Any:
        """The logits without an adapter."""
        return self.logits(self.params)

    @property
    def _inputs(self) -> dict[str, np.ndarray]:
        return {"decoder_input_ids": TOKENS[:, ::-1].copy()} if self.family.encodes else {}

    def logits(self, params: Any) -> Any:
        mode, value = self.family.mode
        return self.flax(TOKENS, params=params, **self._inputs, **{mode: value}).logits

    def torch(self) -> Any:
        """Returns the model in PyTorch, made anew: PEFT changes the one that it is given."""
        model = getattr(transformers, self.family.model.removeprefix("Flax"))(self.config)
        missing, odd = model.load_state_dict(self.state, strict=False)
        assert not odd
        assert all("mask" in n or "position_ids" in n for n in missing), missing
        return model.eval()

    def torch_logits(self, model: Any) -> torch.Tensor:
        inputs = {name: torch.from_numpy(x).long() for name, x in self._inputs.items()}
        return model(torch.from_numpy(TOKENS).long(), **inputs).logits

    def wrap(self, **fields: Any) -> tied_lora.Adapted:
        config = tied_lora.LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})
        return tied_lora.wrap(
            self.params, config, sites=self.sites, ties=self.family.ties, rng=jax.random.key(1)
        )

    def load(self, folder: Path, **options: Any) -> tied_lora.Adapted:
        options = {"sites": self.sites, "ties": self.family.ties, **options}
        return load_adapter(folder, self.params, self.names, **options)

    def save(self, folder: Path, adapted: tied_lora.Adapted, **options: Any) -> None:
        save_adapter(folder, adapted, self.names, **options)


def attention(family: Family) -> list[str]:
    return [target.replace("/", ".") for target in family.attention]


@functools.cache
def model(name: str) -> Model:
    return Model(name)


def trained(mine: Model, adapted: tied_lora.Adapted, steps: int = 4) -> tied_lora.Adapted:
    """Returns adapters after a few AdamW steps."""
    optimizer = optax.adamw(3e-2)

    def loss(adapters: Any) -> Any:
        logits = tied_lora.adapt(mine.logits)(adapted.replace(adapters=adapters))
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    @jax.jit
    def step(adapters: Any, state: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    adapters, state = adapted.adapters, optimizer.init(adapted.adapters)
    for _ in range(steps):
        adapters, state = step(adapters, state)
    return adapted.replace(adapters=adapters)


def moved(adapted: tied_lora.Adapted, deviation: float = 0.1) -> tied_lora.Adapted:
    """Returns a copy whose adapters have moved at random, away from where they started."""
    rng = np.random.default_rng(5)

    def move(x: Any) -> Any:
        return x + jnp.asarray(deviation * rng.standard_normal(x.shape), x.dtype)

    return adapted.replace(adapters=jax.tree.map(move, adapted.adapters))


def with_peft(mine: Model, **fields: Any) -> Any:
    """Returns the PyTorch model with PEFT's adapters."""
    torch.manual_seed(13)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ties and Conv1D, which other tests are for
        fields = {"r": 4, "lora_alpha": 6, **fields}
        return peft.get_peft_model(mine.torch(), peft.LoraConfig(**fields))


def train_there(mine: Model, theirs: Any, steps: int = 4) -> None:
    """Takes a few AdamW steps in PyTorch."""
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=3e-2)
    labels = torch.from_numpy(LABELS).long()
    theirs.eval()  # no dropout
    for _ in range(steps):
        optimizer.zero_grad()
        logits = mine.torch_logits(theirs)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()


def save_there(theirs: Any, folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the base model's config, which is on no hub
        theirs.save_pretrained(folder, **options)


def load_there(mine: Model, folder: Path) -> Any:
    """Returns PEFT's model with the adapter of a folder, for which the file has all it needs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(mine.torch(), folder).eval()
    assert not [w for w in caught if "missing" in str(w.message)], [str(w.message) for w in caught]
    return theirs


def logits_there(mine: Model, theirs: Any) -> np.ndarray:
    with torch.no_grad():
        return mine.torch_logits(theirs).numpy()


def logits_here(mine: Model, adapted: tied_lora.Adapted) -> np.ndarray:
    return np.asarray(tied_lora.adapt(mine.logits)(adapted))


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / WEIGHTS)


def assert_same_tree(found: Any, expected: Any) -> None:
    """Fails unless two trees are equal bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    expected = jax.tree.leaves(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(found), expected, strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))
