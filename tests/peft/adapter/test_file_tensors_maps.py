"""Adapters of leaves that are stored scaled, in another order, or padded."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.flax import load_file as load_flax

import flax_tied_lora as tied_lora
from flax_tied_lora.names import Padding, Permutation, Scale, names_of, to_state_dict
from flax_tied_lora.peft import AdapterFileError, load_adapter, save_adapter, save_merged
from tests.helpers.axis_maps import maps_of
from tests.helpers.damage import CONFIG
from tests.helpers.merged_in_torch import merged_in_torch

# Path, PyTorch name, layout, kind and shape of every form of leaf, and its rows and columns.
FORMS: dict[str, tuple[str, ...]] = {
    "embed_tokens/embedding": ("model.embed_tokens.weight", "v d -> v d", "embedding"),
    "layers_0/q/kernel": ("model.layers.0.q.weight", "i h k -> (h k) i", "linear"),
    "layers_0/o/kernel": ("model.layers.0.o.weight", "h k o -> o (h k)", "linear"),
    "up/weight": ("up.weight", "o i -> o i", "linear"),
    "c/kernel": ("c.weight", "i o -> i o", "conv1d"),
    "stack/kernel": ("stack.{layer}.weight", "{layer} i o -> o i", "linear"),
}
KV = "0 i h k -> (h k) i", "1 i h k -> (h k) i"
SHAPES = {
    "embed_tokens/embedding": (6, 4),
    "layers_0/q/kernel": (4, 2, 6),
    "layers_0/o/kernel": (2, 4, 5),
    "up/weight": (5, 4),
    "c/kernel": (4, 6),
    "stack/kernel": (3, 4, 5),
    "kv/w": (2, 4, 3, 2),
}


def drawn_names(data: Any, dora: bool = False) -> Any:
    """Returns a table with random maps; those of DoRA's inputs pad nothing."""

    def maps(path: str, layout: str) -> dict[str, Any]:
        left = [n for n in layout.partition("->")[0].split() if n.isalpha()]
        sizes = dict(zip(reversed(left), reversed(SHAPES[path]), strict=False))
        inputs = ("h", "k") if path.endswith("o/kernel") else ("i",)
        return {
            n: maps_of(data, sizes[n], padding=not (dora and n in inputs), growing=not dora)
            for n in left
        }

    lines = [
        (path, name, layout, kind, maps(path, layout))
        for path, (name, layout, kind) in FORMS.items()
    ]
    keys, values = (maps("kv/w", layout) for layout in KV)
    values["i"] = keys["i"]  # what both multiply is one array
    lines += [
        ("kv/w", f"{p}_proj.weight", layout, "linear", of_part)
        for p, layout, of_part in zip("kv", KV, (keys, values), strict=True)
    ]
    return names_of(None, lines, tied={"embed_tokens/embedding": ["lm_head"]})


PARAMS = traverse_util.unflatten_dict(
    {
        path: jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)
        for i, (path, shape) in enumerate(SHAPES.items())
    },
    sep="/",
)
NOT_A_TABLE = ["q", "o", "up", "c", "stack", "kv"]


def model(params: Any, tokens: Any) -> Any:
    leaf: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    table = leaf["embed_tokens/embedding"]
    x = table[tokens]
    heads = jnp.einsum("ti,ihk->thk", x, leaf["layers_0/q/kernel"])
    out = jnp.einsum("thk,hko->to", heads[..., :4], leaf["layers_0/o/kernel"])
    step = lambda x, w: (jnp.tanh(x @ w)[:, :4], None)  # noqa: E731
    y = jax.lax.scan(step, x, leaf["stack/kernel"])[0]
    kv = jnp.einsum("ti,cihk->cthk", x, leaf["kv/w"])
    sums = [a.sum() for a in (out, kv, x @ leaf["up/weight"].T, x @ leaf["c/kernel"])]
    return y @ table.T + sum(sums)


SITES = tied_lora.trace(model, PARAMS, jnp.arange(3))


def wrapped(**fields: Any) -> tied_lora.Adapted:
    config = tied_lora.LoraConfig(**{"r": 2, "lora_alpha": 3, **fields})
    adapted = tied_lora.wrap(PARAMS, config, sites=SITES)
    rng = np.random.default_rng(7)
    return adapted.replace(
        adapters=jax.tree.map(
            lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype), adapted.adapters
        )
    )


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["embed_tokens", *NOT_A_TABLE]},
    "parts": {
        "target_modules": ["kv"], "parts": {"kv": (0, ["k_proj", "v_proj"])},
    },
    "dora": {"target_modules": ["q", "o", "up", "c", "kv", "stack"], "use_dora": True},
    "copies": {"target_modules": ["q"], "modules_to_save": ["embed_tokens", "up", "stack"]},
    "rows": {"target_modules": ["q"], "trainable_token_indices": [3, 0, 1, 2]},
    "rows by name": {
        "target_modules": ["q"], "trainable_token_indices": {"embed_tokens": [1, 2, 0, 3]},
    },
}  # fmt: skip


def has_rows(names: Any) -> bool:
    """Returns whether PyTorch's table has each row that is trained."""
    (weight,) = names.to_torch("embed_tokens/embedding", (6, 4))
    return {0, 1, 2, 3} <= set(weight.order(0, 6).tolist())


def assert_same(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, 2e-5, 2e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, phases=[Phase.generate])
@given(data=st.data())
def test_merged_in_pytorch_is_merged_here(tmp_path_factory, kind, data):
    names = drawn_names(data, dora=kind == "dora")
    adapted = wrapped(**KINDS[kind])
    base = to_state_dict(PARAMS, names, duplicates=True)
    folder = tmp_path_factory.mktemp("adapter")
    if "rows" in kind and not has_rows(names):
        with pytest.raises(AdapterFileError, match="has no such row"):
            save_adapter(folder, adapted, names)
        return
    save_adapter(folder, adapted, names)
    merged = to_state_dict(tied_lora.merge(adapted), names, duplicates=True)
    there = merged_in_torch(folder, base, ("c",))
    if "rows" in kind or kind == "copies":  # what PEFT itself ties to the table
        there["lm_head.weight"] = there["model.embed_tokens.weight"]
    assert_same(there, merged)

    again = load_adapter(folder, PARAMS, names, sites=SITES)
    assert_same(to_state_dict(tied_lora.merge(again), names, duplicates=True), merged)
    save_adapter(folder, again, names, overwrite=True)
    assert_same(
        merged_in_torch(folder, base, ("c",)) | {"lm_head.weight": 0}, there | {"lm_head.weight": 0}
    )


def config_in(folder: Any) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def one_leaf(path: str, *line: Any) -> tuple[Any, Any]:
    params = traverse_util.unflatten_dict(
        {path: jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)}, sep="/"
    )
    return params, names_of(None, [(path, *line)])


def test_rows_have_the_numbers_of_pytorchs_table(tmp_path):
    params, names = one_leaf(
        "e/embedding", "e.weight", None, "embedding",
        {"row": (Permutation((3, 1, 0, 2)), Padding(4, 3)), "column": Scale(2.0)},
    )  # fmt: skip
    fields = {"target_modules": [], "trainable_token_indices": [0, 3]}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(**fields))
    save_adapter(tmp_path / "a", adapted, names)
    assert config_in(tmp_path / "a")["trainable_token_indices"] == [2, 0]
    sites = tied_lora.trace(lambda p: p["e"]["embedding"][jnp.arange(2)], params)
    again = load_adapter(tmp_path / "a", params, names, sites=sites)
    assert again.plan.groups[0].adapters[0].tokens == (0, 3)
    padding = tied_lora.wrap(
        params, tied_lora.LoraConfig(**{**fields, "trainable_token_indices": [2]})
    )
    with pytest.raises(
        AdapterFileError, match=r"row 2 of 'e/embedding' is trained, and 'e.weight'"
    ):
        save_adapter(tmp_path / "b", padding, names)


@pytest.mark.parametrize("axis_map", [("in", Padding(4, 3)), ("out", Padding(6, 8))])
def test_dora_of_other_norms_is_refused(tmp_path, axis_map):
    params, names = one_leaf("q/kernel", "q.weight", None, "linear", dict([axis_map]))
    config = tied_lora.LoraConfig(r=2, target_modules=["q"], use_dora=True)
    with pytest.raises(AdapterFileError, match=r"'q/kernel' has use_dora, and 'q.weight' has Padd"):
        save_adapter(tmp_path / "a", tied_lora.wrap(params, config), names)


@pytest.mark.parametrize(
    ("init", "axis_map", "refused"),
    [
        ("pissa", Padding(4, 3), True), ("pissa", Permutation((1, 0, 3, 2)), False),
        ("olora", Permutation((1, 0, 3, 2)), True), ("olora", Scale(3.0), False),
    ],
)  # fmt: skip
def test_factors_that_peft_takes_out_of_its_base(tmp_path, init, axis_map, refused):
    params, names = one_leaf("q/kernel", "q.weight", None, "linear", {"in": axis_map})
    config = tied_lora.LoraConfig(r=2, target_modules=["q"], init_lora_weights=init)
    adapted = tied_lora.wrap(params, config)
    if refused:
        with pytest.raises(AdapterFileError, match=f"'{init}' on 'q/kernel', whose maps"):
            save_adapter(tmp_path / "a", adapted, names)
    else:
        save_adapter(tmp_path / "a", adapted, names)


def test_parts_that_share_an_axis_and_scale_it_otherwise(tmp_path):
    maps = [("k_proj.weight", KV[0], {"i": Scale(3.0)}), ("v_proj.weight", KV[1], {})]
    names = names_of(
        None, [("kv/w", name, layout, "linear", of_part) for name, layout, of_part in maps]
    )
    params = {"kv": PARAMS["kv"]}
    read = lambda p, x: jnp.einsum("ti,cihk->cthk", x, p["kv"]["w"])  # noqa: E731
    sites = tied_lora.trace(read, params, jnp.ones((3, 4)))
    config = tied_lora.LoraConfig(r=2, target_modules=["kv"], init_lora_weights=False)
    adapted = tied_lora.wrap(params, config, sites=sites)
    save_adapter(tmp_path / "a", adapted, names)
    again = load_adapter(tmp_path / "a", params, names, sites=sites)
    assert [a.name for _, a in again.plan.adapters()] == ["k_proj", "v_proj"]
    assert_same(tied_lora.merge(again)["kv"], tied_lora.merge(adapted)["kv"])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_merged_model_is_rounded_once(tmp_path, dtype):
    maps = {"in": Scale(2.0**0.5), "out": (Permutation((2, 1, 0, 5, 4, 3)), Padding(6, 5))}
    params, names = one_leaf("q/kernel", "q.weight", None, "linear", maps)
    config = tied_lora.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    adapted = tied_lora.wrap(params, config)
    save_merged(tmp_path / "m", adapted, names, {"model_type": "own"}, dtype=dtype)
    wide = to_state_dict(tied_lora.merge(adapted, dtype=jnp.float32), names)["q.weight"]
    found = load_flax(tmp_path / "m" / "model.safetensors")["q.weight"]
    assert found.shape == (5, 4)
    np.testing.assert_array_equal(found, jnp.asarray(wide, found.dtype))


def test_an_untied_head_has_the_tables_maps(tmp_path):
    maps = {"row": (Permutation((3, 1, 0, 2)), Padding(4, 3)), "column": Scale(2.0)}
    params, _ = one_leaf("embed_tokens/embedding", "e.weight")
    names = names_of(
        None, [("embed_tokens/embedding", "model.embed_tokens.weight", None, "embedding", maps)],
        tied={"embed_tokens/embedding": ["lm_head"]},
    )  # fmt: skip
    read = lambda p, t: p["embed_tokens"]["embedding"][t] @ p["embed_tokens"]["embedding"].T  # noqa: E731
    sites = tied_lora.trace(read, params, jnp.arange(2))
    config = tied_lora.LoraConfig(
        r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=False,
        init_lora_weights=False,
    )  # fmt: skip
    with pytest.warns(match="ensure_weight_tying"):
        adapted = tied_lora.wrap(params, config, sites=sites)
    untie = {"lm_head": "lm_head/kernel"}
    fields = {"model_type": "own", "vocab_size": 3, "hidden_size": 6, "tie_word_embeddings": True}
    save_merged(tmp_path / "m", adapted, names, fields, untie=untie)
    found = load_flax(tmp_path / "m" / "model.safetensors")
    merged = tied_lora.merge(adapted, untie=untie)
    for name, leaf in (
        ("model.embed_tokens", merged["embed_tokens"]["embedding"]),
        ("lm_head", merged["lm_head"]["kernel"].T),
    ):
        expected = 2 * leaf[np.array([3, 1, 0])]
        np.testing.assert_allclose(found[f"{name}.weight"], expected, 1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["target_modules", "modules_to_save"])
def test_a_table_with_other_rows_than_the_config_is_refused(tmp_path, kind):
    """The error shows the line to add, for a table that was padded."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
    params = {"model": {"embed_tokens": {"embedding": table}}}
    fields = {"target_modules": [], kind: ["embed_tokens"], "r": 2, "init_lora_weights": False}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(**fields))
    config = {"model_type": "llama", "vocab_size": 6, "tie_word_embeddings": True}
    with pytest.raises(AdapterFileError, match=r"8 rows in PyTorch.*vocab_size=6") as error:
        save_adapter(tmp_path / "a", adapted, names_of(config))
    assert not (tmp_path / "a").exists()
    text = str(error.value)
    shown = eval(text[text.index("extra=") + 6 : text.index("). Where tokens")])
    names = names_of(config, extra=shown)
    save_adapter(tmp_path / "a", adapted, names)
    base, merged = (
        to_state_dict(p, names, duplicates=True) for p in (params, tied_lora.merge(adapted))
    )
    assert merged["lm_head.weight"].shape == (6, 4)
    assert_same(merged_in_torch(tmp_path / "a", base), merged)
    save_adapter(tmp_path / "b", adapted, names_of({**config, "vocab_size": 8}))
    save_adapter(tmp_path / "c", adapted, names_of(config), save_embedding_layers=True)
    rows = tied_lora.wrap(params, tied_lora.LoraConfig(
        target_modules=[], trainable_token_indices=[7]
    ))  # fmt: skip
    save_adapter(tmp_path / "d", rows, names_of(config))
