"""Embedding or linear layer: what call sites or the table of names say, and never a leaf's name."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora._planning.plan import Plan
from flax_tied_lora.names import names_of
from flax_tied_lora.peft import AdapterFileError, load_adapter, save_adapter
from flax_tied_lora.train import labels
from tests.helpers.damage import WEIGHTS
from tests.helpers.small_adapters import PREFIX

TOKENS = jnp.array([1, 0, 3])
READ = {
    "lookup": lambda w: w[TOKENS],
    "projection": lambda w: jnp.ones((2, 6)) @ w,
    "one-hot": lambda w: jax.nn.one_hot(TOKENS, 6) @ w,
}
FACTORS = {
    "embedding": ["lora_embedding_A", "lora_embedding_B"],
    "linear": ["lora_A.weight", "lora_B.weight"],
}
LAYOUT = {"embedding": "v d -> v d", "linear": "i o -> o i"}
NAMES = ["embeddings", "embedding", "weight", "kernel"]


def adapted_leaf(name: str, read: str | None) -> tuple[Any, Any, Any]:
    """Returns an adapted leaf of a name, its params, and the call sites of one way to read it."""
    params = {"layer": {name: jax.random.normal(jax.random.key(0), (6, 4))}}
    sites = None
    if read:
        sites = tied_lora.trace(lambda p: READ[read](p["layer"][name]), params)
    config = tied_lora.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    return tied_lora.wrap(params, config, sites=sites), params, sites


def line(name: str, layout: str, *kind: str) -> Any:
    return names_of(None, [(f"layer/{name}", "m.weight", layout, *kind)])


def factors_in(folder: Any) -> list[str]:
    return sorted(n.removeprefix(f"{PREFIX}m.") for n in load_file(folder / WEIGHTS))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("read", "kind"), [("lookup", "embedding"), ("projection", "linear")])
def test_call_sites_say_it(tmp_path, name, read, kind):
    adapted, params, sites = adapted_leaf(name, read)
    names = line(name, LAYOUT[kind])
    save_adapter(tmp_path, adapted, names)
    assert factors_in(tmp_path) == FACTORS[kind]
    again = load_adapter(tmp_path, params, names, sites=sites)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.adapters, adapted.adapters))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("read", [None, "one-hot"])
def test_the_table_of_names_says_it(tmp_path, name, kind, read):
    adapted, _, _ = adapted_leaf(name, read)
    save_adapter(tmp_path, adapted, line(name, LAYOUT[kind], kind))
    assert factors_in(tmp_path) == FACTORS[kind]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("read", [None, "one-hot"])
def test_where_neither_says_it_the_error_says_what_to_pass(tmp_path, name, read):
    adapted, _, _ = adapted_leaf(name, read)
    with pytest.raises(AdapterFileError) as error:
        save_adapter(tmp_path / "a", adapted, line(name, LAYOUT["embedding"]))
    for part in (f"'layer/{name}'", "'m.weight'", '"embedding"', '"linear"', "sites=sites"):
        assert part in str(error.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", FACTORS)
def test_a_file_that_is_read_says_it(tmp_path, kind):
    adapted, params, _ = adapted_leaf("weight", None)
    save_adapter(tmp_path, adapted, line("weight", LAYOUT[kind], kind))
    again = load_adapter(
        tmp_path, params, line("weight", LAYOUT[kind]),
        sites=tied_lora.trace(lambda p: READ["one-hot"](p["layer"]["weight"]), params),
    )  # fmt: skip
    assert jax.tree.all(jax.tree.map(np.array_equal, again.adapters, adapted.adapters))


def two_leaves() -> tuple[Any, Any, Any]:
    """Returns params with a table and a head that are one array, and how they are read."""
    table = jax.random.normal(jax.random.key(1), (6, 4))
    params = {"embed": {"weight": table}, "head": {"weight": table}}
    read = lambda p: p["embed"]["weight"][TOKENS] @ p["head"]["weight"].T  # noqa: E731
    names = names_of(None, [
        ("embed/weight", "embed.weight", "v d -> v d"),
        ("head/weight", "head.weight", "v d -> v d"),
    ])  # fmt: skip
    return params, tied_lora.trace(read, params), names


def test_two_leaves_of_one_array_are_what_each_is_read_as(tmp_path):
    params, sites, names = two_leaves()
    config = tied_lora.LoraConfig(r=2, target_modules=["embed"], init_lora_weights=False)
    adapted = tied_lora.wrap(params, config, sites=sites)
    save_adapter(tmp_path, adapted, names)
    tensors = load_file(tmp_path / WEIGHTS)
    assert sorted(n.removeprefix(PREFIX) for n in tensors) == [
        "embed.lora_embedding_A", "embed.lora_embedding_B",
        "head.lora_A.weight", "head.lora_B.weight",
    ]  # fmt: skip
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}head.lora_B.weight"], tensors[f"{PREFIX}embed.lora_embedding_A"].T
    )


def test_labels_of_separate_leaves_go_by_their_roles():
    params, sites, _ = two_leaves()
    config = tied_lora.LoraConfig(
        r=2, target_modules=["embed", "head"], ensure_weight_tying=False, init_lora_weights=False
    )
    with pytest.warns(match="ensure_weight_tying"):
        adapted = tied_lora.wrap(params, config, sites=sites)
    found = {key.partition(":")[2]: x for key, x in labels(adapted)["lora"].items()}
    assert set(found["embed"].values()) == {"embedding"}
    assert set(found["head"].values()) == {"lora_a", "lora_b"}


def test_a_plan_keeps_roles_and_older_ones_have_none():
    params, sites, _ = two_leaves()
    config = tied_lora.LoraConfig(r=2, target_modules=["embed"])
    plan = tied_lora.wrap(params, config, sites=sites).plan
    assert dict(plan.groups[0].roles) == {"embed/weight": "lookup", "head/weight": "projection"}
    assert Plan.from_json(plan.to_json()) is plan
    content = json.loads(plan.to_json())
    del content["groups"][0]["roles"]
    assert Plan.from_json(json.dumps(content)).groups[0].roles == ()
    content["groups"][0]["roles"] = [["embed/weight", "other"]]
    with pytest.raises(ValueError, match="pairs of a leaf and its role"):
        Plan.from_json(json.dumps(content))
