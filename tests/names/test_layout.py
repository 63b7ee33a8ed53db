"""Tables of names: layouts and lines, asked in both directions."""

from __future__ import annotations

import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

from flax_tied_lora.names import (
    TorchWeight,
    UnmappedError,
    from_state_dict,
    from_torch_array,
    from_torch_arrays,
    names_of,
    to_state_dict,
    to_torch_array,
)
from tests.helpers.name_tables import OWN, SHAPES, assert_same, draw, flat, own


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
        assert kinds == {
            "embed/embedding": "embedding",
            "block_0/attn/q/kernel": "linear",
            "block_0/attn/kv": "linear",
            "block_11/attn/q/kernel": "linear",
            "block_11/attn/kv": "linear",
            "block_0/mlp/up/kernel": "linear",
            "block_0/mlp/up/bias": "vector",
            "experts/3/w": "linear",
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
            "model.layers.0.self_attn.v_proj", "weight", "linear", ((2, 3), (1,)), ((0, 1),)
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


class TestTables:
    def test_each_leaf_there_and_back(self):
        names = own()
        for path, shape in SHAPES.items():
            for weight in names.to_torch(path, shape):
                assert names.to_flax(weight.name) == (path, weight)

    def test_numbers_of_paths_are_kept_as_they_are_written(self):
        names = own()
        (weight,) = names.to_torch("block_007/mlp/up/bias", 1)
        assert weight.name == "model.layers.007.mlp.up_proj.bias"
        assert names.to_flax(weight.name)[0] == "block_007/mlp/up/bias"
        with pytest.raises(UnmappedError):
            names.to_flax("moe.3.experts.01.w.weight")

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("x/kernel", "is no line"),
            (("x/kernel",), "is no line"),
            (("x/kernel", 3), "is no line"),
            (("x", "x.weight", "d -> d", "vector", "more"), "is no line"),
            (("x/{}/kernel", "x.weight"), "placeholder {} is on one side only"),
            (("x/kernel", "x.{}.weight"), "placeholder {} is on one side only"),
            (("x/{a}/kernel", "x.{b}.weight"), "placeholder {a} is on one side only"),
            (("x", "x.weight", "{e} d -> d"), "placeholder {e} is on one side only"),
            (("x/{e}", "x.{e}.weight", "{e} d -> d"), "{e} is in the path and in the layout"),
            (("x/{a}/{a}", "x.{a}.weight"), "must differ"),
            (("x/{_0}/kernel", "x.{_0}.weight"), "must differ and not begin with '_'"),
            (("x/{0}/kernel", "x.{0}.weight"), "has a brace that is no {}"),
            (("x/{/kernel", "x.weight"), "has a brace that is no {}"),
            (("x.kernel", "x/weight"), "expected a Flax path"),
            (("x//kernel", "x.weight"), "expected a Flax path"),
            (("", "x.weight"), "expected a Flax path"),
            (("x/kernel", ".weight"), "expected a Flax path"),
            (("x/kernel", "x.weight", None, "dense"), "kind 'dense' is not one of linear"),
            (("x/kernel", "x.weight", None, "vector"), "a vector parameter has 1 axes"),
            (("x", "x.weight", "a b c -> a b c", "linear"), "a linear parameter has 2 axes"),
        ],
    )
    def test_a_wrong_line_is_explained(self, line, says):
        with pytest.raises(ValueError, match="line") as error:
            names_of("gpt2", [line])
        assert says in str(error.value)

    def test_a_name_in_two_lines_is_an_error(self):
        with pytest.raises(ValueError, match=r"'x.weight' is in two lines"):
            names_of(None, [("x/kernel", "x.weight"), ("y/kernel", "x.weight")])

    def test_two_leaves_of_one_name_are_an_error(self):
        names = names_of("gpt2", [("wte2/embedding", "transformer.wte.weight")])
        table = np.zeros((3, 2), np.float32)
        params = {"wte2": {"embedding": table}, "transformer": {"wte": {"embedding": table}}}
        with pytest.raises(ValueError, match=r"both 'transformer/wte/embedding' and 'wte2/emb"):
            to_state_dict(params, names)

    def test_lines_of_the_user_go_before_the_family_s(self):
        extra = [("transformer/h/{}/attn/c_attn/kernel", "h.{}.qkv.weight", "i o -> o i")]
        names = names_of("gpt2", extra)
        (weight,) = names.to_torch("transformer/h/3/attn/c_attn/kernel", (4, 12))
        assert (weight.name, weight.kind) == ("h.3.qkv.weight", "linear")
        assert names.to_flax("h.3.qkv.weight")[0] == "transformer/h/3/attn/c_attn/kernel"
        (bias,) = names.to_torch("transformer/h/3/attn/c_attn/bias", 1)
        assert bias.name == "transformer.h.3.attn.c_attn.bias"

    def test_hashable_and_equal_by_value(self):
        assert names_of("gpt2") == names_of({"model_type": "gpt2"})
        assert len({own(), own(), names_of("gpt2"), names_of("opt")}) == 3
        assert repr(names_of(None, OWN)) == "Names('own', 12 lines)"

    @pytest.mark.parametrize(
        ("path", "shape", "line"),
        [
            ("h/0/mlp/kernel", (2, 3), ("h/{}/mlp/kernel", "h.{}.mlp.weight")),
            ("h/0/ln/scale", (2,), ("h/{}/ln/scale", "h.{}.ln.weight")),
            ("h_2/x/embedding", (5, 2), ("h_{}/x/embedding", "h_{}.x.weight")),
            (
                "a/q/w", (4, 2, 3),
                ("a/q/w", "a.q.weight", "axis0 axis1 axis2 -> (axis1 axis2) axis0"),
            ),
            ("a/mask", (4, 2), ("a/mask", "a.mask", "axis0 axis1 -> axis0 axis1")),
            ("alpha", (), ("alpha", "alpha", " -> ")),
        ],
    )  # fmt: skip
    def test_the_error_shows_a_line_that_works(self, path, shape, line):
        names = names_of("gpt2")
        with pytest.raises(UnmappedError) as error:
            names.to_torch(path, shape)
        assert str(error.value).startswith(f"leaf {path!r} {list(shape)} has no PyTorch name")
        assert f"extra=[{line!r}]" in str(error.value)
        leaf = np.arange(np.prod(shape)).reshape(shape)
        params = traverse_util.unflatten_dict({path: leaf}, sep="/")
        added = names_of("gpt2", [line])
        assert_same(from_state_dict(to_state_dict(params, added), params, added), params)

    def test_the_error_for_a_name_shows_a_line_that_works(self):
        with pytest.raises(UnmappedError) as error:
            names_of("gpt2").to_flax("transformer.h.4.attn.c_atn.weight")
        line = ("transformer/h/{}/attn/c_atn/kernel", "transformer.h.{}.attn.c_atn.weight")
        assert f"extra=[{line!r}]" in str(error.value)
        assert names_of("gpt2", [line]).to_flax("transformer.h.4.attn.c_atn.weight")
        with pytest.raises(KeyError, match=r"The table has 'model.layers.{}.mlp.up_proj.weight'"):
            own().to_flax("model.up_proj.weight")

    def test_a_leaf_of_another_number_of_axes(self):
        with pytest.raises(ValueError, match=r"\[4, 2, 3\] does not have the 2 axes of its line"):
            own().to_torch("block_0/mlp/up/kernel", (4, 2, 3))
        with pytest.raises(ValueError, match="of 1 axes does not have the 4 axes of its line"):
            own().to_torch("block_0/attn/kv", 1)

    def test_slices_must_be_the_whole_leaf(self):
        with pytest.raises(ValueError, match=r"'block_0/attn/kv' \[3, 4, 2, 3\] is not covered"):
            own().to_torch("block_0/attn/kv", (3, 4, 2, 3))
        with pytest.raises(ValueError, match="one line for each index of axis 0"):
            own().to_torch("block_0/attn/kv", (1, 4, 2, 3))
        mixed = [("x", "k.weight", "0 a b -> a b"), ("x", "v.weight", "a 1 b -> a b")]
        with pytest.raises(ValueError, match="is not covered once"):
            names_of(None, mixed).to_torch("x", (2, 2, 2))

    def test_slices_by_number_need_the_shape(self):
        assert len(own().to_torch("experts/3/w", (4, 12, 5))) == 12
        with pytest.raises(ValueError, match="give to_torch its shape"):
            own().to_torch("experts/3/w", 3)
