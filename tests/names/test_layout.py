"""Layouts: where each element of a leaf is in PyTorch's array, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_tied_lora.names import (
    TorchWeight,
    from_state_dict,
    from_torch_array,
    from_torch_arrays,
    names_of,
    to_state_dict,
    to_torch_array,
)
from tests.helpers.name_tables import SHAPES, assert_same, draw, flat, own


class TestLayouts:
    def test_where_each_element_goes(self):
        params = flat(draw())
        state = to_state_dict(draw(), own())
        q, kv = params["block_11/attn/q/kernel"], params["block_0/attn/kv"]
        np.testing.assert_array_equal(
            state["model.layers.11.self_attn.q_proj.weight"],
            np.stack([q[:, h, k] for h in range(2) for k in range(3)]),
        )
        for i, p in enumerate("kv"):
            np.testing.assert_array_equal(
                state[f"model.layers.0.self_attn.{p}_proj.weight"], kv[i].reshape(4, 6).T
            )
        np.testing.assert_array_equal(
            state["moe.3.experts.10.w.weight"], params["experts/3/w"][:, 10].T
        )
        np.testing.assert_array_equal(
            state["patch.weight"][4, 3], params["patch/kernel"][..., 3, 4]
        )
        np.testing.assert_array_equal(state["row.weight_row"], params["row"][None])
        assert state["gate.alpha"] == params["gate"]
        assert state["gate.alpha"].shape == ()
        assert all(x.flags.c_contiguous for x in state.values())

    def test_kinds_and_dims(self):
        names = own()
        kinds = {p: names.to_torch(p, s)[0].kind for p, s in SHAPES.items()}
        # What a leaf is called says nothing: only a line, or the call sites, know a table.
        assert kinds == {
            "embed/embedding": "matrix",
            "block_0/attn/q/kernel": "matrix",
            "block_0/attn/kv": "matrix",
            "block_11/attn/q/kernel": "matrix",
            "block_11/attn/kv": "matrix",
            "block_0/mlp/up/kernel": "matrix",
            "block_0/mlp/up/bias": "vector",
            "experts/3/w": "matrix",
            "scan/norm/scale": "vector",
            "patch/kernel": "conv",
            "c/kernel": "conv1d",
            "gate": "parameter",
            "row": "parameter",
        }
        (q,) = names.to_torch("block_0/attn/q/kernel", (4, 2, 3))
        assert q.dims == ((1, 2), (0,))
        assert (q.module, q.parameter) == ("model.layers.0.self_attn.q_proj", "weight")
        v = names.to_torch("block_0/attn/kv", 4)[1]
        assert v == TorchWeight(
            "model.layers.0.self_attn.v_proj", "weight", "matrix", ((2, 3), (1,)), ((0, 1),)
        )

    @given(st.data())
    def test_any_layout_round_trips_bit_for_bit(self, data):
        ndim = data.draw(st.integers(0, 5))
        shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
        sliced = data.draw(st.sets(st.integers(0, ndim - 1), max_size=2)) if ndim else set()
        left = [f"{{i{a}}}" if a in sliced else f"a{a}" for a in range(ndim)]
        order = data.draw(st.permutations([f"a{a}" for a in range(ndim) if a not in sliced]))
        right = []
        for name in order:
            if right and data.draw(st.booleans()):
                right[-1].append(name)
            else:
                right.append([name])
        if data.draw(st.booleans()):
            right.insert(0, [])
        text = " ".join({0: "1", 1: "".join(g)}.get(len(g), f"({' '.join(g)})") for g in right)
        name = ".".join(["m", *(f"{{i{a}}}" for a in sorted(sliced)), "p"])
        names = names_of(None, [("x/y", name, f"{' '.join(left)} -> {text}")])
        leaf = np.random.default_rng(0).standard_normal(shape)
        params = {"x": {"y": leaf}}
        state = to_state_dict(params, names)
        assert sum(x.size for x in state.values()) == leaf.size
        assert all(names.to_flax(n)[0] == "x/y" for n in state)
        assert_same(from_state_dict(state, params, names), params)

    @pytest.mark.parametrize(
        ("layout", "says"),
        [
            ("a b", "no '->'"),
            ("a a -> a", "'a' twice on the left"),
            ("(a b) -> a b", "brackets on the left"),
            ("a b -> a", "'b' once on the right"),
            ("a b -> a b b", "'b' once on the right"),
            ("a -> a b", "'b' on the right and not on the left"),
            ("a b -> (a b", "bracket that is not closed"),
            ("a b -> a) b", "')' is out of place"),
            ("a b -> ((a) b)", "'(' is out of place"),
            ("a b -> a 2 b", "'2' is out of place"),
            ("a b -> a {b}", "'b' is out of place"),
            ("a -> a, 1", "', 1', which is no axis"),
            ("a ... -> a", "'...', which is no axis"),
        ],
    )
    def test_a_wrong_layout_is_explained(self, layout, says):
        with pytest.raises(ValueError, match="table of names, line") as error:
            names_of(None, [("x/kernel", "x.weight", layout)])
        assert says in str(error.value)
        assert repr(layout) in str(error.value)


class TestArrays:
    kv = TorchWeight("k", dims=((2, 3), (1,)), part=((0, 1),))

    def test_a_slice_comes_back_without_its_axes(self):
        leaf = np.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
        array = to_torch_array(leaf, self.kv)
        np.testing.assert_array_equal(array, leaf[1].reshape(4, 15).T)
        np.testing.assert_array_equal(from_torch_array(array, self.kv, leaf.shape), leaf[1])
        other = TorchWeight("v", dims=self.kv.dims, part=((0, 0),))
        both = [to_torch_array(leaf, w) for w in (self.kv, other)]
        np.testing.assert_array_equal(from_torch_arrays(both, [self.kv, other], leaf.shape), leaf)

    def test_what_does_not_fit(self):
        with pytest.raises(ValueError, match=r"layout for a Flax leaf of 4 axes, found a leaf \[2"):
            to_torch_array(np.zeros((2, 3)), self.kv)
        with pytest.raises(ValueError, match="layout for a Flax leaf of 4 axes"):
            from_torch_array(np.zeros((15, 4)), self.kv, (4, 3, 5))
        with pytest.raises(ValueError, match=r"is slice 1 of axis 0 .* which has only 1"):
            to_torch_array(np.zeros((1, 4, 3, 5)), self.kv)

    def test_a_parameter_without_a_module(self):
        assert TorchWeight("", "final_logits_bias").name == "final_logits_bias"
