"""Whole params to state dicts and back: ties, prefixes, old names, and what does not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.names import (
    UnmappedError,
    from_state_dict,
    names_of,
    state_entries,
    to_state_dict,
)
from tests.helpers.name_tables import OWN, assert_same, draw, flat, own


class TestStateDicts:
    def test_there_and_back(self):
        params = draw()
        state = to_state_dict(params, own())
        assert_same(from_state_dict(state, params, own()), params)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        assert_same(from_state_dict(state, shapes, own()), params)

    def test_bfloat16_and_jax_arrays(self):
        params = jax.tree.map(jnp.asarray, draw(dtype=jnp.bfloat16))
        state = to_state_dict(params, own(), duplicates=True)
        assert {x.dtype for x in state.values()} == {jnp.dtype(jnp.bfloat16)}
        assert_same(from_state_dict(state, params, own()), params)

    def test_entries_are_made_when_asked_for(self):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), draw())
        abstract = state_entries(shapes, own())
        entries = state_entries(draw(), own())
        assert [e[:3] for e in abstract] == [e[:3] for e in entries]
        for entry in entries:
            made = entry.get()
            assert (made.shape, made.dtype) == (entry.shape, entry.dtype)

    def test_tied_tensors_once_or_under_all_names(self):
        state = to_state_dict(draw(), own())
        assert "lm_head.weight" not in state
        every = to_state_dict(draw(), own(), duplicates=True)
        assert set(every) == {*state, "lm_head.weight"}
        np.testing.assert_array_equal(every["lm_head.weight"], state["model.embed_tokens.weight"])

    def test_any_name_of_a_tied_tensor_will_do(self):
        params = draw()
        state = to_state_dict(params, own(), duplicates=True)
        assert_same(from_state_dict(state, params, own()), params)
        del state["model.embed_tokens.weight"]
        assert_same(from_state_dict(state, params, own()), params)

    def test_copies_of_a_tied_tensor_must_agree(self):
        state = to_state_dict(draw(), own(), duplicates=True)
        state["lm_head.weight"] = state["lm_head.weight"] + 1
        with pytest.raises(ValueError, match=r"embed_tokens.weight and lm_head.weight differ"):
            from_state_dict(state, draw(), own())

    def test_a_head_with_a_leaf_of_its_own_that_the_config_ties(self):
        names = names_of("llama", tie_word_embeddings=True)
        table = draw()["embed"]["embedding"]
        table[0, 0] = np.nan
        params = {"model": {"embed_tokens": {"embedding": table}}, "lm_head": {"kernel": table.T}}
        state = to_state_dict(params, names)
        assert list(state) == ["model.embed_tokens.weight"]
        assert len(to_state_dict(params, names, duplicates=True)) == 2
        assert_same(from_state_dict(state, params, names), params)
        params["lm_head"]["kernel"] = table.T + 1
        with pytest.raises(ValueError, match=r"'lm_head/kernel' float32\[4, 7\] is not 'model/emb"):
            to_state_dict(params, names)
        assert len(to_state_dict(params, names_of("llama"))) == 2

    def test_names_with_and_without_the_prefix_are_understood(self):
        names, shapes = names_of("gpt2"), {"wte/embedding": (5, 4), "h/0/ln_1/scale": (4,)}
        bare = draw(shapes)
        headed = {"transformer": bare}
        assert_same(from_state_dict(to_state_dict(bare, names), headed, names), headed)
        assert_same(from_state_dict(to_state_dict(headed, names), bare, names), bare)

    def test_old_names_and_buffers(self):
        names = names_of("bert")
        params = draw({"bert/embeddings/LayerNorm/scale": (4,)})
        scale = flat(params)["bert/embeddings/LayerNorm/scale"]
        tensors = {
            "bert.embeddings.LayerNorm.gamma": scale,
            "bert.embeddings.position_ids": np.arange(5)[None],
        }
        assert_same(from_state_dict(tensors, params, names), params)

    def test_a_missing_tensor_is_named(self):
        state = to_state_dict(draw(), own())
        del state["c.weight"]
        with pytest.raises(ValueError, match=r"leaf 'c/kernel' float32\[6, 4\] is c.weight in Py"):
            from_state_dict(state, draw(), own())

    def test_tensors_without_a_leaf_are_named(self):
        state = to_state_dict(draw(), own())
        state |= {f"more.{i}": np.zeros(2) for i in range(7)}
        with pytest.raises(
            ValueError, match=r"more.0, more.1, .* more.4 and 2 more: .*strict=False"
        ):
            from_state_dict(state, draw(), own())
        assert_same(from_state_dict(state, draw(), own(), strict=False), draw())

    def test_another_shape_is_named(self):
        state = to_state_dict(draw(), own())
        state["c.weight"] = state["c.weight"].T
        with pytest.raises(ValueError, match=r"c.weight has shape \[6, 4\], expected \[4, 6\]"):
            from_state_dict(state, draw(), own())

    def test_slices_of_several_dtypes(self):
        state = to_state_dict(draw(), own())
        name = "model.layers.0.self_attn.v_proj.weight"
        state[name] = state[name].astype(np.float16)
        with pytest.raises(ValueError, match=r"different dtypes \(float16, float32\)"):
            from_state_dict(state, draw(), own())

    def test_an_unmapped_leaf(self):
        with pytest.raises(UnmappedError, match="'new/kernel'"):
            to_state_dict({"new": {"kernel": np.zeros((2, 3))}}, own())
        with pytest.raises(UnmappedError, match="'new/kernel'"):
            from_state_dict({}, {"new": {"kernel": np.zeros((2, 3))}}, own())

    def test_leaves_that_are_no_arrays(self):
        taken_out = {"gate": tied_lora.TiedLeaf("embed/embedding")}
        for convert in (to_state_dict, lambda params, names: from_state_dict({}, params, names)):
            with pytest.raises(ValueError, match="leaf 'gate' is a float, expected an array"):
                convert({"gate": 1.0}, own())
            with pytest.raises(ValueError, match="was taken out of these params by wrap"):
                convert(taken_out, own())

    @pytest.mark.parametrize(
        ("tied", "says"),
        [
            ({"embed/embedding": "lm_head"}, "expected PyTorch module names"),
            ({"embed/embedding": (3,)}, "expected PyTorch module names"),
            ({"embed/table": ("lm_head",)}, "tied: leaf 'embed/table'"),
            ({"embed/embedding": ("model.embed_tokens",)}, "is 'embed/embedding' itself"),
        ],
    )
    def test_wrong_ties_are_explained(self, tied, says):
        with pytest.raises(ValueError, match="tied") as error:
            names_of(None, OWN, tied=tied)
        assert says in str(error.value)
