"""Adapters of leaves that PyTorch has otherwise: head axes, fused and stacked kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of, to_state_dict
from flax_tied_lora.peft import AdapterFileError, load_adapter, save_adapter
from tests.helpers.damage import WEIGHTS
from tests.helpers.name_tables import TUNIX, tunix_names
from tests.helpers.small_adapters import PREFIX, draw, factors, put


def tunix(case: str, *targets: str) -> tuple[Any, Any, Any]:
    """Returns tunix's params, names, and call sites of their kernels."""
    shapes = TUNIX[case][2]
    flat = {p: jnp.asarray(draw(i, *s)) for i, (p, s) in enumerate(shapes.items())}

    def read(p: Any, x: Any) -> Any:
        leaf = traverse_util.flatten_dict(p, sep="/")
        out = []
        for path, formula in EINSUMS.items():
            if path in leaf:
                inputs = jnp.ones(IN[formula.partition(",")[0]], np.float32) + x
                out.append(jnp.einsum(formula, inputs, leaf[path]).sum())
        return sum(out)

    p = traverse_util.unflatten_dict(flat, sep="/")
    return p, tunix_names(case), tied_lora.trace(read, p, np.float32(0))


EINSUMS = {
    "layers/0/attn/q_proj/w": "td,dnh->tnh",
    "layers/0/attn/k_proj/w": "td,dnh->tnh",
    "layers/0/attn/v_proj/w": "td,dnh->tnh",
    "layers/0/attn/o_proj/w": "tnh,nhd->td",
    "layers/0/attn/q_einsum/w": "td,ndh->tnh",
    "layers/0/attn/kv_einsum/w": "td,cndh->ctnh",
    "layers/0/attn/qkv_einsum/w": "td,cndh->ctnh",
    "layers/0/attn/attn_vec_einsum/w": "tnh,nhd->td",
}
IN = {"td": (5, 32), "tnh": (5, 4, 16)}
ATTENTION = "model.layers.0.self_attn"


def projection(module: str, rows: int, cols: int, seed: int = 0) -> dict[str, np.ndarray]:
    name = f"{PREFIX}{ATTENTION}.{module}"
    return {
        f"{name}.lora_A.weight": draw(50 + seed, 2, rows),
        f"{name}.lora_B.weight": draw(60 + seed, cols, 2),
    }


@pytest.mark.parametrize("case", ["qwen3", "gemma2"])
def test_kernels_with_head_axes(tmp_path, case):
    p, names, sites = tunix(case)
    tensors = projection("q_proj", 32, 64) | projection("o_proj", 64, 32, 1)
    put(tmp_path, tensors, target_modules=["q_proj", "o_proj"])
    adapted = load_adapter(tmp_path, p, names, sites=sites)
    merged = to_state_dict(tied_lora.merge(adapted), names)
    base = to_state_dict(p, names)
    for module in ("q_proj", "o_proj"):
        name = f"{ATTENTION}.{module}"
        delta = (
            2
            * tensors[f"{PREFIX}{name}.lora_B.weight"]
            @ (tensors[f"{PREFIX}{name}.lora_A.weight"])
        )
        found = merged[f"{name}.weight"] - base[f"{name}.weight"]
        np.testing.assert_allclose(found, delta, atol=1e-5)
    save_adapter(tmp_path / "b", adapted, names)
    found = load_file(tmp_path / "b" / WEIGHTS)
    assert set(found) == set(tensors)
    for name, x in found.items():
        np.testing.assert_array_equal(x, tensors[name])


def test_modules_of_a_fused_leaf_that_share_lora_a(tmp_path):
    p, names, sites = tunix("gemma2")
    tensors = projection("k_proj", 32, 32) | projection("v_proj", 32, 32, 1)
    k, v = (f"{PREFIX}{ATTENTION}.{m}_proj.lora_A.weight" for m in "kv")
    tensors[v] = tensors[k].copy()
    put(tmp_path, tensors, target_modules=["k_proj", "v_proj"])
    adapted = load_adapter(tmp_path, p, names, sites=sites)
    save_adapter(tmp_path / "b", adapted, names)
    found = load_file(tmp_path / "b" / WEIGHTS)
    assert set(found) == set(tensors)
    for name, x in found.items():
        np.testing.assert_array_equal(x, tensors[name])


def test_half_of_a_fused_leaf(tmp_path):
    """An adapter for values only: the keys' half of the leaf stays as it is."""
    p, names, sites = tunix("gemma2")
    tensors = projection("v_proj", 32, 32)
    put(tmp_path, tensors, target_modules=["v_proj"])
    adapted = load_adapter(tmp_path, p, names, sites=sites)
    merged, base = to_state_dict(tied_lora.merge(adapted), names), to_state_dict(p, names)
    for module in ("k_proj", "v_proj"):
        x, y = (s[f"{ATTENTION}.{module}.weight"] for s in (merged, base))
        same = np.array_equal(x, y)
        assert same is (module == "k_proj")


STACKED = names_of(
    None, [("layers/q/kernel", "model.layers.{layer}.q_proj.weight", "{layer} in out -> out in")]
)


def stacked(p: Any, x: Any) -> Any:
    step = lambda x, w: (x @ w, None)  # noqa: E731
    return jax.lax.scan(step, x, p["layers"]["q"]["kernel"])[0]


def test_stacked_layers(tmp_path):
    p = {"layers": {"q": {"kernel": jnp.asarray(draw(3, 3, 4, 4))}}}
    x = draw(4, 2, 4)
    sites = tied_lora.trace(stacked, p, x)
    modules = [f"model.layers.{i}.q_proj" for i in range(3)]
    tensors = factors(*modules)
    put(tmp_path, tensors)
    adapted = load_adapter(tmp_path, p, STACKED, sites=sites)
    own = adapted.adapters["lora"]["layers/q/kernel"]
    assert own["lora_a"].shape == (3, 4, 2)
    for i, module in enumerate(modules):
        np.testing.assert_array_equal(
            own["lora_a"][i], tensors[f"{PREFIX}{module}.lora_A.weight"].T
        )
    save_adapter(tmp_path / "b", adapted, STACKED)
    found = load_file(tmp_path / "b" / WEIGHTS)
    assert set(found) == set(tensors)
    for name, x in found.items():
        np.testing.assert_array_equal(x, tensors[name])
    # Of three layers two: the third one's factors are zeros here, which is the same.
    put(tmp_path, factors(*modules[:2]), layers_to_transform=[0, 1])
    own = load_adapter(tmp_path, p, STACKED, sites=sites).adapters["lora"]["layers/q/kernel"]
    assert not own["lora_b"][2].any()


def test_ranks_that_differ_in_one_leaf(tmp_path):
    p = {"layers": {"q": {"kernel": jnp.asarray(draw(3, 2, 4, 4))}}}
    sites = tied_lora.trace(stacked, p, draw(4, 2, 4))
    tensors = factors("model.layers.0.q_proj") | factors("model.layers.1.q_proj", rank=3)
    put(tmp_path, tensors, rank_pattern={"layers.1.q_proj": 3})
    with pytest.raises(
        AdapterFileError, match=r"different (ranks|values).*'model.layers.1.q_proj'"
    ):
        load_adapter(tmp_path, p, STACKED, sites=sites)
